"""A dynamic diffusion transformer on the handwritten digits: fine-tuned from a dense one, it draws
digits as recognisable for at most 60 % of the work.

Trains a dense SiT and a classifier that judges its samples, gives the SiT gates over heads, channels
and tokens, fine-tunes it under a loss on its work, and shows at which time which of them run.

Usage: python examples/dynamic_dit_digits.py [--out FOLDER] [--steps N] [--finetune N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from effformer.compress import Frugal, GateTable, WorkTarget
from torch import Tensor, nn

import effformer
from effformer.flow import Guidance, sample
from effformer.profile import profile
from effformer.train import Dataset, TrainConfig, load_data, train, train_classifier
from effformer.train.recipes import DIGITS

HEADS, SAMPLES = 6, 1000
WORK, LOSS = 0.60, 0.02
"""Largest share of the dense model's work, and largest loss of accuracy."""

TIMES = torch.arange(DIGITS.steps) / DIGITS.steps
"""When the Euler sampler evaluates the model."""


def dense_model(data: Dataset, steps: int) -> Any:
    """The recipe's SiT, with more and narrower heads, so that there is something to choose from."""
    torch.manual_seed(0)
    model = effformer.build_model(DIGITS.model, **DIGITS.overrides, heads=HEADS)
    train(model, data, DIGITS.objective, DIGITS.config.replace(steps=steps, warmup=min(50, steps)))
    return model


def dynamic_model(dense: Any, data: Dataset, steps: int, *, target: float = 0.5) -> Any:
    """The dense model with gates, fine-tuned to do ``target`` of the work of its blocks.

    Gates start open, at a small bias: there are thousands of times fewer steps than in the paper.
    """
    effformer.sort_by_magnitude(dense)
    gate = {"name": "dynamic", "bias": 2.0}
    torch.manual_seed(1)
    model = type(dense)(dense.config.replace(width=gate, tokens=gate), name=dense.name)
    effformer.load_weights(model, dense.state_dict())
    course = WorkTarget(share=target, warmup=steps // 3, hold=0)
    objective = Frugal(task=DIGITS.objective, target=course, weight=10.0)
    config = TrainConfig(steps=steps, batch=64, lr=2e-3, warmup=min(20, steps), ema=0.99, seed=1)
    train(model, data, objective, config)
    return model


def draw(model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Samples (count, 1, 8, 8) and the classes that they should show."""
    labels = torch.arange(count) % 10
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    guidance = Guidance(DIGITS.guidance, null={"y": 10})
    drawn = sample(model.eval(), noise, steps=DIGITS.steps, guidance=guidance, y=labels)
    return drawn.x, labels


def work_over_time(model: Any, data: Dataset) -> list[float]:
    """Executed multiply-adds per sample at each time of the sampler, on noised digits."""
    images, labels = data["x"][:100], data["y"][:100]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    work = []
    for t in TIMES.tolist():
        x = (1 - t) * noise + t * images
        inputs = {"x": x, "t": torch.full((len(x),), t), "y": labels}
        done = profile(model, inputs, memory=False).executed
        assert done is not None
        work.append(done / len(x))
    return work


def show(path: Path, table: GateTable, work: list[float], dense: Tensor, dynamic: Tensor) -> None:
    """One picture: samples of both models, executed work and gates over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from effformer.files import atomic_path

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
    for ax, title, images in ((axes[0, 0], "dense", dense), (axes[0, 1], "dynamic", dynamic)):
        grid = images[:40].clamp(-1, 1).reshape(4, 10, 8, 8).permute(0, 2, 1, 3).reshape(32, 80)
        ax.imshow(grid.numpy(), cmap="gray")
        ax.set(title=f"samples, {title}", xticks=[], yticks=[])
    axes[1, 0].bar(range(len(work)), work, color="tab:blue")
    axes[1, 0].axhline(1, color="gray", linewidth=1)
    axes[1, 0].set(title="executed work, dense = 1", xlabel="step of the sampler", ylim=(0, 1.05))
    rows = torch.cat([gate.T for gate in table.active.values()])
    units = next(iter(table.active.values())).shape[1]
    axes[1, 1].imshow(rows.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes[1, 1].set(title="active heads and channel groups", xlabel="step of the sampler")
    axes[1, 1].set_yticks([units * (i + 0.5) for i in range(len(table.active))], table.active)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90)
    pyplot.close(figure)


def print_table(table: GateTable) -> None:
    """The gates as text: one row per part, one column per time, active units of all."""
    print(f"{'t':>16} " + " ".join(f"{t:4.1f}" for t in table.times.tolist()))
    for path, gate in table.active.items():
        counts = " ".join(f"{n:2d}/{gate.shape[1]}" for n in gate.sum(dim=1).tolist())
        print(f"{path:>16} {counts}")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run everything; returns the numbers that are asserted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("dynamic_dit_digits"), help="folder")
    parser.add_argument("--steps", type=int, default=DIGITS.config.steps, help="of the dense model")
    parser.add_argument("--finetune", type=int, default=900, help="steps of the dynamic model")
    options = parser.parse_args(argv)
    data = load_data("digits")
    judge = train_classifier(data)
    print(f"classifier: {judge.accuracy:.1%} of held-out digits")
    dense = dense_model(data, options.steps)
    dense_samples, labels = draw(dense, SAMPLES)
    before = judge.recognised(dense_samples, labels)
    model = dynamic_model(dense, data, options.finetune)
    samples, _ = draw(model, SAMPLES)
    after = judge.recognised(samples, labels)
    whole = mean(work_over_time(dense, data))
    work = [done / whole for done in work_over_time(model, data)]
    table = effformer.prepare_widths(model, TIMES)
    print_table(table)
    print(f"recognised: dense {before:.1%}, dynamic {after:.1%} at {mean(work):.1%} of the work")
    options.out.mkdir(parents=True, exist_ok=True)
    show(options.out / "dynamic_dit_digits.png", table, work, dense_samples, samples)
    effformer.save_pretrained(model, options.out / "model")
    assert mean(work) <= WORK, f"executes {mean(work):.1%} of the dense work, more than {WORK:.0%}"
    assert after >= before - LOSS, f"{after:.1%} recognised, {before:.1%} of the dense model's"
    return {"dense": before, "dynamic": after, "work": mean(work)}


if __name__ == "__main__":
    main()
