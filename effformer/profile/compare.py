"""Several models in one table, measured in one run, and their Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from effformer import registry
from effformer.arguments import checked
from effformer.calls import Inputs
from effformer.checks import unknown
from effformer.values import Threads, Times, Warmup

from .html import comparison_section, report_page
from .latency import Latency, interleave
from .plots import Pareto
from .profiler import Progress, profile
from .result import Profile
from .save import COMPARISON, Saved
from .tables import amount, size, table

__all__ = ["METRICS", "Comparison", "ComparisonRow", "Metric", "compare", "labels"]

Metric = Literal["latency", "macs", "executed", "params", "memory", "bytes", "errors"]
METRICS: dict[Metric, str] = {
    "latency": "latency / ms",
    "macs": "GMACs",
    "executed": "executed GMACs",
    "params": "parameters / M",
    "memory": "peak activations / MB",
    "bytes": "size / MB",
    "errors": "not recognised / %",
}
"""Metric -> axis label with unit; less is better for each."""


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One model, or one form of it.

    Attributes:
        name: unique name in the table.
        profile: its cost, None where there is only a file.
        times: its wall time at each number of threads, and that over the time of the first row;
            empty if it was not measured.
        bytes: size of its weights, or of its file.
        error: largest difference of its outputs from those of the first row, relative to the largest
            of these; None if they are no forms of one model.
        quality: share that it gets right, or that is recognised of what it draws, in [0, 1]; None if
            that was not measured (`Quality`).
    """

    name: str
    profile: Profile | None
    times: tuple[tuple[Latency, float], ...] = ()
    bytes: int | None = None
    error: float | None = None
    quality: float | None = None

    @property
    def latency(self) -> Latency | None:
        """The wall time at the first number of threads."""
        return self.times[0][0] if self.times else None

    @property
    def ratio(self) -> float | None:
        """The same over that of the first row."""
        return self.times[0][1] if self.times else None

    @checked
    def value(self, metric: Metric) -> float | None:
        """A metric in the unit of `METRICS`, None if it was not measured."""
        p, t = self.profile, self.latency
        memory = None if p is None else p.memory
        raw: dict[Metric, float | None] = {
            "latency": None if t is None else 1e3 * t.median,
            "macs": None if p is None else p.total / 1e9,
            "executed": None if p is None or p.executed is None else p.executed / 1e9,
            "params": None if p is None else p.params / 1e6,
            "memory": None if memory is None else memory.peak / 1e6,
            "bytes": None if self.bytes is None else self.bytes / 1e6,
            "errors": None if self.quality is None else 100 * (1 - self.quality),
        }
        if metric not in raw:
            raise unknown("metric", metric, list(raw))
        return raw[metric]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "profile": None if self.profile is None else self.profile.to_dict(),
            "latency": None if self.latency is None else asdict(self.latency),
            "ratio": self.ratio,
            "times": [{"latency": asdict(t), "ratio": ratio} for t, ratio in self.times],
            "bytes": self.bytes,
            "error": self.error,
            "quality": self.quality,
        }


@dataclass(frozen=True, slots=True)
class Comparison(Saved):
    """Models side by side.

    Attributes:
        rows: one per model, in the order given.
        how: how the times were measured, in words.
    """

    KIND = COMPARISON

    rows: tuple[ComparisonRow, ...]
    how: str = ""

    @checked
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

    def against(self) -> Metric:
        """What the times are drawn against: quality where it was measured, else work, or the size
        where it tells the rows apart and the work does not, or is not known.
        """
        if all(row.quality is not None for row in self.rows):
            return "errors"
        macs, bytes_ = ({row.value(m) for row in self.rows} for m in ("macs", "bytes"))
        return (
            "bytes" if None not in bytes_ and (None in macs or len(bytes_) > len(macs)) else "macs"
        )

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and cells, one row per model."""
        lines = [self._cells(row) for row in self.rows]
        if all(line["executed"] == line["MACs"] for line in lines):
            for line in lines:
                del line["executed"]
        header = [c for c in lines[0] if any(line[c] != "-" for line in lines)]
        return tuple(c.strip() for c in header), [tuple(line[c] for c in header) for line in lines]

    def _cells(self, row: ComparisonRow) -> dict[str, str]:
        """The cells of a row by column; "-" for what is not known."""
        p, one = row.profile, len(row.times) < 2
        cells = {
            "model": row.name,
            "parameters": "-" if p is None else amount(p.params),
            "MACs": "-" if p is None else amount(p.total),
            "executed": "-" if p is None or p.executed is None else amount(p.executed),
            "peak": "-" if p is None or p.memory is None else size(p.memory.peak),
            "size": "-" if row.bytes is None else size(row.bytes),
        }
        for i, (found, ratio) in enumerate(row.times):
            count = f"{found.threads} thread{'s' * (found.threads > 1)}"
            cells["latency" if one else count] = f"{1e3 * found.median:.4g} ms"
            if one:
                cells |= {"p10": f"{1e3 * found.p10:.4g} ms", "p90": f"{1e3 * found.p90:.4g} ms"}
            cells["ratio" + " " * i] = f"{ratio:.3f}x"  # columns of equal names have different keys
        memory = [found.memory for found, _ in row.times if found.memory is not None]
        cells["process"] = size(max(memory)) if memory else "-"
        cells["recognised"] = "-" if row.quality is None else f"{row.quality:.1%}"
        cells["error"] = "-" if row.error is None else f"{row.error:.1e}"
        return cells

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"rows": [row.to_dict() for row in self.rows]}

    def _body(self) -> str:
        return comparison_section(self)

    def _rows(self) -> list[dict[str, Any]]:
        """Models, each with what was measured in the unit of `METRICS`."""
        units = {metric: label.replace(" / ", "_") for metric, label in METRICS.items()}
        return [
            {"name": row.name, "error": row.error}
            | {units[metric].replace(" ", "_"): row.value(metric) for metric in METRICS}
            for row in self.rows
        ]

    def _page(self) -> str:
        profiles = [row.profile for row in self.rows if row.profile is not None]
        return report_page(profiles, self)

    def __str__(self) -> str:
        return "\n".join([table(*self.table()), *([self.how] if self.how else [])])


@checked
def compare(
    models: Sequence[nn.Module | str],
    inputs: Inputs | None = None,
    *,
    names: Sequence[str] | None = None,
    time: bool = True,
    warmup: Warmup = 2,
    runs: Times = 7,
    threads: Threads | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Profile several models and time them in turns, in this process. What other runtimes do, and what
    a number of threads does, measures `effformer.profile.benchmark`, one process for each.

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
    called = labels(built, names, where="compare")
    profiles = []
    for label, model in zip(called, built, strict=True):
        if progress is not None:
            progress(f"counting {label}")
        profiles.append(profile(model, inputs))
    if not time:
        return Comparison(tuple(map(ComparisonRow, called, profiles)))
    if progress is not None:
        progress("measuring latency")
    side = interleave(
        dict(zip(called, built, strict=True)), inputs, warmup=warmup, runs=runs, threads=threads
    )
    rows = (
        ComparisonRow(label, p, ((side.rows[label], side.ratios[label]),))
        for label, p in zip(called, profiles, strict=True)
    )
    first = next(iter(side.rows.values()))
    how = f"{first.runs} runs each in turns after {first.warmup}, in one process; {first.machine}"
    return Comparison(tuple(rows), how)


def _build(name: str, *, meta: bool) -> nn.Module:
    entry = registry.model.get(name)
    with torch.device("meta" if meta else torch.get_default_device()):
        model: nn.Module = entry.build(entry.preset, entry.name)
    return model


def labels(models: Sequence[nn.Module], names: Sequence[str] | None, *, where: str) -> list[str]:
    """Names of models as given, or their own, numbered where they repeat.

    Raises:
        ValueError: as many names as there are not models, or equal ones.
    """
    if names is not None:
        if len(names) != len(models) or len(set(names)) != len(names):
            raise ValueError(
                f"{where}: {len(models)} models need as many different names, got {list(names)}"
            )
        return list(names)
    own = [str(getattr(m, "name", type(m).__name__)) for m in models]
    return [n if own.count(n) == 1 else f"{n} #{own[: i + 1].count(n)}" for i, n in enumerate(own)]
