"""What a person sees of a training: what it is made of, how long it takes, pictures, and a page."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from effformer.train import Dataset, Objective, TrainConfig, Validation

__all__ = ["Watch", "header", "seconds_per_step"]

ACCURACY = "val_accuracy"
KIND = "training"
"""Of the pages and pictures that stand in the folder of a run."""


def header(model: nn.Module, data: Dataset, config: TrainConfig, pace: float) -> str:
    """Data and what of them is cut away, model and expected time in one line."""
    import torch

    from ..profile import count_parameters

    shape = "x".join(map(str, data["x"].shape[1:]))
    minutes, threads = config.steps * pace / 60, torch.get_num_threads()
    time = f"{minutes:.0f} min" if minutes >= 2 else f"{minutes * 60:.0f} s"
    return (
        f"{len(data):,} samples {shape} of {data.name} in {len(data.classes)} classes"
        + (f", up to {data.cut:.0%} of an image cut away" if data.cut >= 0.005 else "")
        + "; "
        f"{getattr(model, 'name', 'model')}, {count_parameters(model):,} parameters; "
        f"{config.steps:,} steps of {config.batch}"
        + (f", about {time} on {threads} thread{'s' * (threads > 1)}" if pace else "")
    )


def seconds_per_step(
    model: nn.Module, data: Dataset, objective: Objective, config: TrainConfig
) -> float:
    """Measured on a copy of the model, after a first step that is not counted."""
    from ..train import train

    trial = copy.deepcopy(model)
    short = config.replace(steps=1, warmup=0)
    train(trial, data, objective, short, progress=False)
    began = time.perf_counter()
    train(trial, data, objective, short.replace(steps=2), progress=False)
    return (time.perf_counter() - began) / 2


@dataclass(frozen=True, slots=True)
class Watch:
    """Looks at a model while it is trained: loss on held-out data, of a classifier the accuracy as well, a
    grid of samples, a page.

    Attributes:
        run: folder of the run.
        title: what is trained, see `header`.
        validation: None if no data were held out.
        pictures: whether the samples are pictures.
    """

    run: Path
    title: str
    validation: Validation | None
    pictures: bool

    def __call__(self, model: nn.Module, step: int) -> Mapping[str, float]:
        if self.pictures:
            self._draw(model, step)
        return {} if self.validation is None else self.validation(model, step)

    def measured(self) -> dict[str, float]:
        """The last accuracy on held-out data, empty if there is none."""
        from ..train import read_metrics

        points = _points(read_metrics(self.run), ACCURACY)
        return {ACCURACY: points[-1][1]} if points else {}

    def _draw(self, model: nn.Module, step: int) -> None:
        """One sample of each of the first ten classes."""
        from ..export.run import write_image
        from ..files import atomic_path
        from ..wrapped import bare
        from .drawing import draw, pixels

        plain: Any = bare(model)
        labels = range(min(plain.config.num_classes, 10))
        samples = draw(plain, labels, guidance=None)
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        with atomic_path(folder / f"step-{step:08d}.png") as temporary:
            write_image(temporary, pixels(samples), force=True)

    def report(self) -> Path:
        """Write ``report.html`` of what the run has recorded."""
        from ..files import atomic_path
        from ..profile.html import page
        from ..profile.plots import Curves
        from ..train import read_metrics

        records = read_metrics(self.run)
        losses = {name: _points(records, name) for name in ("loss", "val_loss")}
        body = [
            "<h1>Training</h1>",
            f"<p>{escape(self.title)}</p>",
            _tiles(records),
            "<h2>Loss</h2>",
            f'<div class="plot">{Curves(_some(losses), "step", "loss").svg()}</div>',
            *_plot("Accuracy", "share of held-out samples", _points(records, ACCURACY)),
            "<h2>Learning rate</h2>",
            f'<div class="plot">{Curves(_some({"lr": _points(records, "lr")}), "step", "rate").svg()}</div>',
            *self._grids(),
        ]
        file = self.run / "report.html"
        with atomic_path(file, KIND) as temporary:
            temporary.write_text(page("Training", "\n".join(body), KIND), encoding="utf-8")
        return file

    def _grids(self) -> list[str]:
        """The last grids of samples, the newest first."""
        from ..profile.html import gallery

        files = sorted((self.run / "samples").glob("step-*.png"))[:-9:-1]
        steps = [f"step {int(file.stem.removeprefix('step-')):,}" for file in files]
        words = "one of each class, averaged weights"
        shown = gallery((file, step, words) for file, step in zip(files, steps, strict=True))
        return ["<h2>Samples</h2>", shown] if files else []


def _points(records: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(r["step"], r[name]) for r in records if name in r]


def _plot(title: str, axis: str, points: list[tuple[float, float]]) -> list[str]:
    """A curve under its title, nothing if there are no points."""
    from ..profile.plots import Curves

    if not points:
        return []
    return [
        f"<h2>{title}</h2>",
        f'<div class="plot">{Curves({axis: points}, "step", axis).svg()}</div>',
    ]


def _some(
    lines: Mapping[str, list[tuple[float, float]]],
) -> dict[str, list[tuple[float, float]]]:
    return {name.replace("_", " "): points for name, points in lines.items() if points}


def _tiles(records: Sequence[Mapping[str, float]]) -> str:
    from ..profile.html import tiles

    last = records[-1]
    shown = [
        (f"{last['step']:,}", "steps"),
        (f"{last['loss']:.4f}", "loss"),
        (f"{last['step'] / last['seconds']:.3g}", "steps per second"),
        (f"{last['seconds'] / 60:.1f} min", "spent"),
    ]
    if held_out := _points(records, "val_loss"):
        shown.insert(2, (f"{held_out[-1][1]:.4f}", "loss on held-out data"))
    if right := _points(records, ACCURACY):
        shown.insert(1, (f"{right[-1][1]:.1%}", "of held-out data right"))
    return tiles(shown)
