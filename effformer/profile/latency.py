"""Wall time: warm-up, median and spread, threads stated; candidates measured side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep
from typing import Annotated, Any

import torch
from torch import nn

from effformer.arguments import checked
from effformer.calls import Inputs, bind, check_parts, evaluating
from effformer.notebook import Shown
from effformer.values import Range, Threads, Times, Warmup
from effformer.wrapped import bare, is_compiled

from .fake import on_real
from .machine import Machine, machine

__all__ = ["Latency", "SideBySide", "interleave", "latency", "timed"]


Pause = Annotated[float, Range(0, 3600)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency(Shown):
    """Wall time of one call, in seconds.

    Attributes:
        name: what was called.
        median: median over the runs.
        p10: 10th percentile.
        p90: 90th percentile.
        runs: number of timed calls.
        warmup: calls before them.
        threads: torch's threads during the measurement.
        dtype: type of the parameters.
        device: where it ran.
        form: "eager", "compiled" (the model, or a part of it, went through ``torch.compile``), or
            another runtime.
        machine: CPU, flags and versions.
        samples: every timed call, in order.
        waited: share of the time for which threads were ready and had no processor, as far as it was
            measured (`effformer.profile.benchmark`).
        memory: bytes by which the process grew to load and to run it, None if it had none of its own.
    """

    name: str
    median: float
    p10: float
    p90: float
    runs: int
    warmup: int
    threads: int
    dtype: str
    device: str
    form: str
    machine: Machine
    samples: tuple[float, ...]
    waited: float = 0.0
    memory: int | None = None

    def _facts(self) -> dict[str, Any]:
        facts = dataclasses.asdict(self)
        del facts["samples"]
        return facts | {"machine": str(self.machine)}

    def __str__(self) -> str:
        return (
            f"{self.name}: {1e3 * self.median:.3g} ms "
            f"(p10 {1e3 * self.p10:.3g}, p90 {1e3 * self.p90:.3g}; {self.runs} runs after "
            f"{self.warmup}, {self.threads} threads, {self.dtype}, {self.device}, {self.form})"
        )


@dataclass(frozen=True, slots=True)
class SideBySide(Shown):
    """Candidates that took turns in one run, so that drift of the machine hits all alike.

    Attributes:
        rows: name -> `Latency`.
        ratios: name -> median over the rounds of (its time / time of the first candidate in the
            same round).
    """

    rows: dict[str, Latency]
    ratios: dict[str, float]

    def _facts(self) -> dict[str, Any]:
        return {
            "rows": [row._facts() | {"ratio": self.ratios[name]} for name, row in self.rows.items()]
        }

    def __str__(self) -> str:
        return "\n".join(f"{self.ratios[name]:7.3f}x  {row}" for name, row in self.rows.items())


@checked
def latency(
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    warmup: Warmup = 3,
    runs: Times = 11,
    threads: Threads | None = None,
    compile: bool = False,
) -> Latency:
    """Time a forward in evaluation mode without gradients.

    Args:
        model: any module with real parameters.
        inputs: as in `effformer.profile.profile`.
        warmup: calls that are not timed.
        runs: timed calls.
        threads: torch's threads; None leaves them. What was set before is restored.
        compile: time ``torch.compile(model)``; compilation happens in the warm-up.

    Raises:
        ValueError: runs or threads below 1, negative warm-up, or parameters on the meta device.
        TypeError: inputs that the model does not accept.
    """
    both = interleave(
        {_name(model): model}, inputs, warmup=warmup, runs=runs, threads=threads, compile=compile
    )
    return next(iter(both.rows.values()))


@checked
def interleave(
    candidates: Mapping[str, nn.Module | Callable[[], Any]],
    inputs: Inputs | None = None,
    *,
    warmup: Warmup = 3,
    runs: Times = 11,
    threads: Threads | None = None,
    compile: bool = False,
    pause: Pause = 0.0,
) -> SideBySide:
    """Time several candidates in turns: a b c a b c ...; ratios are relative to the first.

    Args:
        candidates: name -> module (called with ``inputs``, or its own example inputs) or function
            without arguments.
        inputs: for the modules.
        warmup: untimed calls of each.
        runs: timed calls of each.
        threads: torch's threads; None leaves them.
        compile: compile the modules.
        pause: seconds of rest before every timed call; threads of one runtime that still spin
            would slow the next.

    Raises:
        ValueError: no candidates, or as in `latency`.
    """
    if not candidates:
        raise ValueError("interleave: no candidates")
    calls = {name: _call(name, c, inputs, compile) for name, c in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    modules = nn.ModuleList(c for c in candidates.values() if isinstance(c, nn.Module))
    with evaluating(modules), _threads(threads), torch.no_grad():
        for call in calls.values():
            for _ in range(warmup):
                call()
        for _ in range(runs):
            for name, call in calls.items():
                sleep(pause)
                samples[name].append(timed(call))
        facts = machine()
    rows = {n: _latency(n, candidates[n], samples[n], warmup, compile, facts) for n in calls}
    first = samples[next(iter(samples))]
    ratios = {n: median(a / b for a, b in zip(s, first, strict=True)) for n, s in samples.items()}
    return SideBySide(rows, ratios)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """10th percentile, median and 90th percentile."""
    places = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    p10, middle, p90 = torch.tensor(samples, dtype=torch.float64).quantile(places).tolist()
    return p10, middle, p90


def _name(model: nn.Module) -> str:
    return str(getattr(bare(model), "name", type(bare(model)).__name__))


def _call(
    name: str, candidate: nn.Module | Callable[[], Any], inputs: Inputs | None, compile: bool
) -> Callable[[], Any]:
    if compile or isinstance(candidate, torch.export.ExportedProgram):
        check_parts(candidate, where="latency")
    if not isinstance(candidate, nn.Module):
        return candidate
    if any(p.is_meta for p in candidate.parameters()):
        raise ValueError(
            f"latency: {name} is on the meta device; build it with real parameters to time it"
        )
    given = on_real(candidate, bind(candidate, inputs, where="latency")).inputs
    model: Callable[..., Any] = torch.compile(candidate) if compile else candidate
    return lambda: given(model)


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call, until what it gave to an accelerator is done."""
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else int
    wait()
    start = perf_counter()
    call()
    wait()
    return perf_counter() - start


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _latency(
    name: str, candidate: object, samples: list[float], warmup: int, compiled: bool, facts: Machine
) -> Latency:
    p = next(candidate.parameters(), None) if isinstance(candidate, nn.Module) else None
    p10, middle, p90 = percentiles(samples)
    compiled = isinstance(candidate, nn.Module) and (compiled or is_compiled(candidate))
    return Latency(
        name=name,
        median=middle,
        p10=p10,
        p90=p90,
        runs=len(samples),
        warmup=warmup,
        threads=facts.threads,
        dtype="-" if p is None else str(p.dtype).removeprefix("torch."),
        device="cpu" if p is None else str(p.device),
        form="compiled" if compiled else "eager",
        machine=facts,
        samples=tuple(samples),
    )
