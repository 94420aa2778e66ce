"""The whole chain on one model: fewer steps, guidance learned, half of the work, and a runtime without torch.

A digits diffusion transformer in 50 guided Euler steps under eager torch is what one has after training.
Ours follows its samples (reflow, distilled to k steps, with the guidance inside), is pruned to half of its
multiply-adds and runs as an edge bundle. Both draw ten digits.

Usage: python benchmarks/few_steps.py [--small]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from cpu_time import take_turns
from effformer.compress import prune
from effformer.export import export_bundle
from effformer.export.run import Bundle
from markdown import Row, write

import effformer
from effformer.cli.drawing import draw
from effformer.flow import FlowMatching, adapt, frechet_distance, sample
from effformer.flow.guidance import Guidance
from effformer.profile import profile
from effformer.train import Dataset, Generation, TrainConfig, load_data, train, train_classifier
from effformer.train.classifier import RECIPE as JUDGE
from effformer.train.recipes import DIGITS

STEPS, GUIDANCE = 50, 2.0
"""Of the sampler that is replaced."""
FEW = (4, 2, 1)
NULL = 10
AIM = 1 / 20


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; the small form only shows that the script runs."""

    judge: int = 300
    train: int = 1500
    follow: int = 3000
    pairs: int = 10_000
    judged: int = 2000
    runs: int = 21


SMALL = Sizes(judge=20, train=2, follow=2, pairs=20, judged=20, runs=1)


def pairs_of(teacher: Any, count: int) -> Dataset:
    """Noise, labels, and what the dense model makes of them."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(count) % 10
    noise = torch.randn(count, *teacher.example_inputs(1)["x"].shape[1:], generator=generator)
    rule = Guidance(GUIDANCE, {"y": NULL})
    made = [
        sample(adapt(teacher), x, sampler="euler", steps=STEPS, guidance=rule, y=y).x
        for x, y in zip(noise.split(500), labels.split(500), strict=True)
    ]
    return Dataset(
        "pairs", {"x": torch.cat(made), "y": labels, "noise": noise}, load_data("digits").classes
    )


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Says how many of some samples are recognised, and how far they are from real ones."""

    network: Any
    real: torch.Tensor

    def __call__(self, samples: np.ndarray[Any, Any], labels: list[int]) -> tuple[float, float]:
        x = torch.from_numpy(samples)
        share = 100 * self.network.recognised(x, torch.tensor(labels))
        return share, frechet_distance(self.network.features(x), self.real)


def main() -> None:
    sizes = SMALL if "--small" in sys.argv else Sizes()
    torch.set_num_threads(1)
    data = load_data("digits")
    network = train_classifier(data, config=JUDGE.replace(steps=sizes.judge))
    judge = Judge(network=network, real=network.features(data["x"]))
    torch.manual_seed(0)
    dense: Any = effformer.build_model(DIGITS.model, **DIGITS.overrides)
    config = DIGITS.config.replace(steps=sizes.train, warmup=min(50, sizes.train))
    train(dense, data, DIGITS.objective, config, progress=False)
    dense.eval()
    pairs = pairs_of(dense, sizes.pairs)
    options = {"macs": 0.5, "importance": "taylor", "recover": "least-squares"}
    calibration = {name: x[:512] for name, x in data.tensors.items()}
    half, _ = prune(dense, options, data=calibration, objective=DIGITS.objective)

    labels, ten = list(range(10)) * (sizes.judged // 10), list(range(10))
    eager = partial(draw, dense, steps=STEPS, guidance=GUIDANCE, seed=1)
    found = {"dense": judge(eager(labels), labels)}
    calls: dict[str, Any] = {"dense": partial(eager, ten)}
    with TemporaryDirectory() as folder:
        for steps in FEW:
            name = f"{steps} steps" if steps > 1 else "1 step"
            law = {"name": "k-step", "k": steps}
            task = Generation(loss=FlowMatching.Config(time=law), label_drop=0.0)
            config = TrainConfig(
                steps=sizes.follow, batch=64, lr=2e-3, warmup=min(50, sizes.follow), ema=0.995
            )
            train(half, pairs, task, config, progress=False)
            export_bundle(
                half.eval(), Path(folder, name), sampler="euler", steps=steps, guidance=1.0
            )
            bundle = Bundle(Path(folder, name), threads=1)
            found[name] = judge(bundle.sample(labels, seed=1), labels)
            calls[name] = partial(bundle.sample, ten, seed=1)
            print(name, found, flush=True)
        times = take_turns(calls, runs=sizes.runs)
    macs = [profile(m, memory=False).total for m in (dense, half)]
    share, distance = found["dense"]
    rows = [
        Row(
            what=f"dense, {STEPS} steps, eager: ten digits",
            value=times.median("dense"),
            spread=times.spread("dense"),
            ratio=1.0,
        ),
        Row(what="dense: recognised, Frechet distance", value=f"{share:.1f} %, {distance:.3f}"),
    ]
    for name in list(found)[1:]:
        own, away = found[name]
        good = own >= share - 2 and away <= 1.1 * distance
        rows += [
            Row(what=f"ours, {name}: ten digits", value=times.median(name), spread=times.spread(name),
                ratio=times.ratio(name), target=AIM),
            Row(what=f"ours, {name}: recognised, Frechet distance",
                value=f"{own:.1f} %, {away:.3f}: {'within' if good else '**not within**'} 2 points and 10 %"),
        ]  # fmt: skip
    notes = [
        f"dense: {DIGITS.model}, {macs[0]:,} multiply-adds a step and digit, twice for its guidance of {GUIDANCE:g}; ours: "
        f"{macs[1]:,}, once: the pairs were drawn with guidance",
        f"{sizes.pairs:,} pairs of noise and guided sample; {sizes.follow:,} steps of 64 pairs for each number of "
        "steps, beginning with the network of more steps",
        f"{sizes.judged:,} samples each; Frechet distance to the real digits, in features of a judge that is trained on "
        "real digits only; time is CPU time of one thread, in one process, taking turns",
        "a part of this needs no training: the dense model recognises 100 % in 10 guided Euler steps, too "
        "(compress_digits.md), a fifth of the work",
    ]
    write(
        "few_steps",
        "Ten digits: the whole chain",
        rows,
        times.machine,
        notes,
        keep=sizes is not SMALL,
    )


if __name__ == "__main__":
    main()
