"""PredFormer sees a digit move through a small frame and predicts how it goes on.

Every clip is made while training: a digit starts anywhere, moves at a constant speed along both axes
and bounces off the borders. The model sees five frames and predicts the next five in one pass. On
clips of digits that it has never seen, its squared error must be at most a third of that of
repeating the last frame. The picture shows what was seen, what comes next and what was predicted,
also further ahead than trained: then the model goes on from its own frames.

    python examples/predformer_moving_digits.py                # the packaged digits
    python examples/predformer_moving_digits.py --data DIR     # IDX files, for instance MNIST
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from effformer.models import PredFormer
from torch import Tensor, nn

import effformer
from effformer.context import Ledger
from effformer.io import atomic_path
from effformer.nn.init import truncated_normal_linears
from effformer.train import Batch, Dataset, TrainConfig, load_data, train

SIDE, DIGIT, FRAMES = 16, 8, 5
"""Pixels of a frame and of a digit; frames in, and out of one pass."""
SPEED = 2
"""Largest speed along an axis, pixels per frame; the smallest is 1."""
REQUIRED = 1 / 3
"""Largest squared error, as a share of that of the last frame repeated."""


def paths(count: int, frames: int, generator: torch.Generator) -> Tensor:
    """Corners (count, frames, 2) of digits that move straight on and bounce off the borders."""
    room = SIDE - DIGIT
    # there and back again is one round of 2 room pixels, and a start on it is a place and a direction
    start = torch.randint(2 * room, (count, 1, 2), generator=generator)
    speed = torch.randint(1, SPEED + 1, (count, 1, 2), generator=generator)
    way = (start + speed * torch.arange(frames)[:, None]) % (2 * room)
    return room - (way - room).abs()


def draw(digits: Tensor, corners: Tensor) -> Tensor:
    """Clips (B, T, 1, S, S) of digits (B, 1, d, d) with corners (B, T, 2), black elsewhere."""
    batch, frames, _ = corners.shape
    clips = torch.zeros(batch, frames, SIDE, SIDE)
    inside = torch.arange(DIGIT)
    rows = (corners[..., 0, None] + inside)[..., :, None]
    columns = (corners[..., 1, None] + inside)[..., None, :]
    samples, times = torch.arange(batch)[:, None, None, None], torch.arange(frames)[:, None, None]
    clips[samples, times, rows, columns] = digits.expand(-1, frames, -1, -1)
    return clips[:, :, None]


def make_clips(images: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Clips (B, T, 1, S, S) in [0, 1] of images (B, 1, d, d) in [-1, 1]."""
    return draw((images + 1) / 2, paths(len(images), frames, generator))


class Standardized(nn.Module):
    """A model that sees and predicts frames of mean 0 and variance 1.

    Frames are mostly black. As they are, their patches hardly show beside the position table, whose
    entries are sines and cosines of full size, and the model takes long to see what moves.

    Args:
        model: the model.
        clips: clips whose mean and deviation are taken.
    """

    def __init__(self, model: PredFormer, clips: Tensor) -> None:
        super().__init__()
        self.model = model
        self.mean, self.deviation = clips.mean().item(), clips.std().item()

    def forward(self, x: Tensor) -> Tensor:
        """The T frames behind those of x (B, T, C, H, W)."""
        return self.predict(x, x.shape[1])

    def predict(self, x: Tensor, frames: int) -> Tensor:
        """Any number of frames behind those of x (B, T, C, H, W)."""
        predicted = self.model.predict((x - self.mean) / self.deviation, frames)
        return predicted * self.deviation + self.mean


@dataclass(frozen=True)
class NextFrames:
    """Mean squared error of the predicted frames of new clips."""

    def __call__(
        self, model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        clips = make_clips(batch["x"], 2 * FRAMES, generator)
        return (model(clips[:, :FRAMES]) - clips[:, FRAMES:]).square().mean()


def read(source: str) -> tuple[Dataset, Dataset]:
    """Digits to train with, and others to test with; those of IDX files lose their margin."""
    if source == "digits":
        return load_data(source).split(0.2, seed=0)
    learned = load_data(source, size=DIGIT + 2)
    tested = load_data(source, part="test", size=DIGIT + 2)
    return without_margin(learned), without_margin(tested)


def without_margin(data: Dataset) -> Dataset:
    """The same images without their outermost pixels."""
    return replace(data, tensors={**data.tensors, "x": data["x"][..., 1:-1, 1:-1]})


def build(data: Dataset, *, seed: int = 0) -> Standardized:
    """A small binary PredFormer, time before space, for clips of the data."""
    torch.manual_seed(seed)
    model = effformer.build_model(
        "predformer-tiny", axes="ts", dim=64, depth=4, heads=4, patch=4, size=(SIDE, SIDE),
        frames=FRAMES,
    )  # fmt: skip
    assert isinstance(model, PredFormer)
    # the published 0.02 is for width 256; this narrow, blocks would begin by doing almost nothing
    truncated_normal_linears(model.blocks, std=0.1)
    clips = make_clips(data["x"][:1000], FRAMES, torch.Generator().manual_seed(seed))
    return Standardized(model, clips)


def fit(model: Standardized, data: Dataset, steps: int, *, seed: int = 0) -> None:
    """Train on clips that are made for every step."""
    config = TrainConfig(
        steps=steps, batch=16, lr=4e-3, warmup=min(steps, 50), weight_decay=0.01,
        betas=(0.9, 0.98), ema=None, seed=seed,
    )  # fmt: skip
    train(model, data, NextFrames(), config)
    model.eval()


def predict(model: Standardized, seen: Tensor, frames: int, batch: int = 50) -> Tensor:
    """Frames (B, frames, 1, S, S) behind those of seen (B, T, 1, S, S)."""
    with torch.inference_mode():
        return torch.cat([model.predict(part, frames) for part in seen.split(batch)])


def picture(path: Path, clips: Tensor, predicted: Tensor) -> None:
    """Rows of frames: what was seen and what follows, and under it what was predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count, frames = clips.shape[:2]
    figure, axes = pyplot.subplots(
        2 * count, frames, figsize=(0.62 * frames, 1.3 * count), layout="constrained"
    )
    for panel in axes.flat:
        panel.axis("off")
    for i, (upper, lower) in enumerate(axes.reshape(count, 2, frames)):
        for panel, frame in zip(upper, clips[i, :, 0], strict=True):
            panel.imshow(frame.numpy(), cmap="gray", vmin=0, vmax=1)
        for panel, frame in zip(lower[-predicted.shape[1] :], predicted[i, :, 0], strict=True):
            panel.imshow(frame.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
    for column, text in ((0, "seen"), (FRAMES, "next"), (2 * FRAMES, "further than trained")):
        if column < frames:
            axes[0, column].set_title(text, fontsize=8, loc="left")
    axes[1, FRAMES].set_title("predicted", fontsize=8, loc="left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run everything; returns the numbers that are asserted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="a folder of IDX files, or 'digits'")
    parser.add_argument("--out", type=Path, default=Path("predformer_digits.png"), help="picture")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    options: Any = parser.parse_args(argv)
    # operators this small gain little from a second thread, and lose much where cores are shared
    torch.set_num_threads(1)
    began = time.perf_counter()
    learned, tested = read(options.data)
    model = build(learned)
    fit(model, learned, options.steps)
    print(f"trained on clips of {len(learned):,} digits in {time.perf_counter() - began:.0f} s")
    clips = make_clips(tested["x"][:300], 3 * FRAMES, torch.Generator().manual_seed(1))
    seen, wanted = clips[:, :FRAMES], clips[:, FRAMES:]
    predicted = predict(model, seen, wanted.shape[1])
    errors = (predicted - wanted).square().mean(dim=(0, 2, 3, 4))
    copied = (seen[:, -1:] - wanted).square().mean(dim=(0, 2, 3, 4))
    print("frame  squared error  last frame repeated")
    for i, (error, copy) in enumerate(zip(errors.tolist(), copied.tolist(), strict=True)):
        print(f"{i + 1:5d}  {error:13.5f}  {copy:19.5f}")
    share = (errors[:FRAMES].sum() / copied[:FRAMES].sum()).item()
    further = (errors[FRAMES:].sum() / copied[FRAMES:].sum()).item()
    print(f"{share:.1%} of the error of the last frame repeated, further ahead {further:.1%}")
    picture(options.out, clips[:4], predicted[:4])
    assert share <= REQUIRED, f"{share:.1%} of the error of the last frame, more than a third"
    return {"share": share, "further": further, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
