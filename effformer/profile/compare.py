"""Several models in one table, measured in one run, and their Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from effformer import registry
from effformer.calls import Inputs
from effformer.checks import unknown

from .html import report_page
from .latency import Latency, interleave
from .plots import Pareto
from .profiler import Progress, profile
from .result import Profile
from .save import COMPARISON, save_report
from .tables import amount, size, table

__all__ = ["METRICS", "Comparison", "ComparisonRow", "Metric", "compare"]

Metric = Literal["latency", "macs", "executed", "params", "memory"]
METRICS: dict[Metric, str] = {
    "latency": "latency / ms",
    "macs": "GMACs",
    "executed": "executed GMACs",
    "params": "parameters / M",
    "memory": "peak activations / MB",
}
"""Metric -> axis label with unit; less is better for each."""


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One model.

    Attributes:
        name: unique name in the table.
        profile: its cost.
        latency: its wall time, None if it was not measured.
        ratio: its wall time over that of the first row, None likewise.
    """

    name: str
    profile: Profile
    latency: Latency | None
    ratio: float | None

    def value(self, metric: Metric) -> float | None:
        """A metric in the unit of `METRICS`, None if it was not measured."""
        memory = self.profile.memory
        raw: dict[Metric, float | None] = {
            "latency": None if self.latency is None else 1e3 * self.latency.median,
            "macs": self.profile.total / 1e9,
            "executed": None if self.profile.executed is None else self.profile.executed / 1e9,
            "params": self.profile.params / 1e6,
            "memory": None if memory is None else memory.peak / 1e6,
        }
        if metric not in raw:
            raise unknown("metric", metric, list(raw))
        return raw[metric]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "profile": self.profile.to_dict(),
            "latency": None if self.latency is None else asdict(self.latency),
            "ratio": self.ratio,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Models side by side.

    Attributes:
        rows: one per model, in the order given.
    """

    rows: tuple[ComparisonRow, ...]

    def pareto(self, x: Metric = "latency", y: Metric = "macs") -> Pareto:
        """A plot of two metrics in which the models that no other one beats in both are joined.

        Raises:
            ValueError: unknown metric, or one that was not measured.
        """
        points = []
        for row in self.rows:
            px, py = row.value(x), row.value(y)
            if px is None or py is None:
                missing = x if px is None else y
                raise ValueError(f"pareto: {missing!r} was not measured for {row.name!r}")
            points.append((row.name, px, py))
        return Pareto(tuple(points), METRICS[x], METRICS[y])

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and cells, one row per model."""
        columns: dict[str, list[str]] = {
            name: []
            for name in (
                "model",
                "parameters",
                "MACs",
                "executed",
                "peak",
                "latency",
                "p10",
                "p90",
                "ratio",
            )
        }
        for row in self.rows:
            p, t = row.profile, row.latency
            times = (
                ["-"] * 3 if t is None else [f"{1e3 * s:.4g} ms" for s in (t.median, t.p10, t.p90)]
            )
            cells = [
                row.name,
                amount(p.params),
                amount(p.total),
                "-" if p.executed is None else amount(p.executed),
                "-" if p.memory is None else size(p.memory.peak),
                *times,
                "-" if row.ratio is None else f"{row.ratio:.3f}x",
            ]
            for column, cell in zip(columns.values(), cells, strict=True):
                column.append(cell)
        if columns["executed"] == columns["MACs"]:
            del columns["executed"]
        return tuple(columns), list(zip(*columns.values(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"rows": [row.to_dict() for row in self.rows]}

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write as .json, .html (one self-contained page) or .txt.

        Raises:
            ValueError: another suffix.
            FormatError: the file cannot be written, or is no earlier comparison (``force`` replaces
                it all the same); what was there before is intact.
        """
        profiles = [row.profile for row in self.rows]
        save_report(
            path, COMPARISON, data=self.to_dict, text=self.__str__,
            page=lambda: report_page(profiles, self), force=force,
        )  # fmt: skip

    def __str__(self) -> str:
        lines = [table(*self.table())]
        first = self.rows[0].latency
        if first is not None:
            lines.append(f"{first.runs} runs each in turns after {first.warmup}, {first.machine}")
        return "\n".join(lines)


def compare(
    models: Sequence[nn.Module | str],
    inputs: Inputs | None = None,
    *,
    names: Sequence[str] | None = None,
    time: bool = True,
    warmup: int = 2,
    runs: int = 7,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Profile several models and time them in turns.

    Args:
        models: modules, or names of registered models (built with their presets and random
            weights).
        inputs: the same inputs for all, or None for each model's own.
        names: names in the table; default: the models' own, numbered where they repeat.
        time: measure latency; without it names are built on the meta device.
        warmup: untimed calls of each.
        runs: timed calls of each.
        threads: torch's threads.
        progress: called with the name of each stage.

    Raises:
        ValueError: no models, an unknown name, or as many names as there are not models.
    """
    if not models:
        raise ValueError("compare: no models given")
    built = [_build(m, meta=not time) if isinstance(m, str) else m for m in models]
    labels = _labels(built, names)
    profiles = []
    for label, model in zip(labels, built, strict=True):
        if progress is not None:
            progress(f"counting {label}")
        profiles.append(profile(model, inputs))
    if not time:
        return Comparison(tuple(map(_untimed, labels, profiles)))
    if progress is not None:
        progress("measuring latency")
    side = interleave(
        dict(zip(labels, built, strict=True)), inputs, warmup=warmup, runs=runs, threads=threads
    )
    rows = (
        ComparisonRow(label, p, side.rows[label], side.ratios[label])
        for label, p in zip(labels, profiles, strict=True)
    )
    return Comparison(tuple(rows))


def _untimed(name: str, cost: Profile) -> ComparisonRow:
    return ComparisonRow(name, cost, None, None)


def _build(name: str, *, meta: bool) -> nn.Module:
    entry = registry.model.get(name)
    with torch.device("meta" if meta else torch.get_default_device()):
        model: nn.Module = entry.build(entry.preset, entry.name)
    return model


def _labels(models: Sequence[nn.Module], names: Sequence[str] | None) -> list[str]:
    if names is not None:
        if len(names) != len(models) or len(set(names)) != len(names):
            raise ValueError(
                f"compare: {len(models)} models need as many different names, got {list(names)}"
            )
        return list(names)
    own = [str(getattr(m, "name", type(m).__name__)) for m in models]
    return [n if own.count(n) == 1 else f"{n} #{own[: i + 1].count(n)}" for i, n in enumerate(own)]
