"""Candidates timed one per process, in rounds, so that no runtime waits in the way of another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from effformer.arguments import checked
from effformer.notebook import Shown
from effformer.values import QUIET, Threads, Times, Warmup

from .latency import Latency, SideBySide, percentiles
from .machine import Machine
from .tables import size, table

__all__ = ["BUSY", "Benchmark", "Candidate", "benchmark"]

BUSY = 0.1
"""Share of the time for which threads waited for a processor, from which a machine counts as busy."""

Progress = Callable[[int, int], None]
"""(processes done, processes in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Something that can be timed in a process of its own.

    Attributes:
        name: its name in the results.
        load: a function of a module; called in that process with ``options``, it returns what is
            timed, a function without arguments.
        options: JSON values.
        form: what runs, for the results, for instance "eager" or "onnxruntime".
        dtype: type of its numbers, for the results.
        device: where it runs, for the results.
    """

    name: str
    load: Callable[..., Callable[[], Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    form: str = "eager"
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark(Shown):
    """What `benchmark` found.

    Attributes:
        sides: number of threads -> times, ratios relative to the first candidate.
        errors: candidate -> largest difference of its outputs from those of the first one, relative
            to the largest of these; empty if they were not compared, or if these are all zero.
        rounds: processes of every candidate at every number of threads.
    """

    sides: dict[int, SideBySide]
    errors: dict[str, float]
    rounds: int

    @property
    def busy(self) -> float:
        """Share of the time for which threads waited for a processor, of the slowest case."""
        return max(row.waited for side in self.sides.values() for row in side.rows.values())

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and cells, one row per candidate."""
        first = next(iter(self.sides.values()))
        header, rows = ["candidate", "form"], [[n, r.form] for n, r in first.rows.items()]
        for threads, side in self.sides.items():
            header += [f"{threads} thread{'s' * (threads > 1)}", "ratio"]
            for row, (name, found) in zip(rows, side.rows.items(), strict=True):
                row += [f"{1e3 * found.median:.4g} ms", f"{side.ratios[name]:.3f}x"]
        header.append("memory")
        for row, found in zip(rows, first.rows.values(), strict=True):
            row.append("-" if found.memory is None else size(found.memory))
        if self.errors:
            header.append("error")
            for row in rows:
                row.append(f"{self.errors[row[0]]:.1e}")
        return tuple(header), [tuple(row) for row in rows]

    def _facts(self) -> dict[str, Any]:
        sides = (side._facts()["rows"] for side in self.sides.values())
        return {"rows": [row for rows in sides for row in rows], "measured": self.how()}

    def how(self) -> str:
        """One sentence about the way it was measured, with a warning if the machine was busy."""
        row = next(iter(self.sides[max(self.sides)].rows.values()))
        runs, threads = row.runs // self.rounds, " and ".join(map(str, self.sides))
        said = (
            f"each candidate alone in its process, {self.rounds} round{'s' * (self.rounds > 1)} of "
            f"processes in turns, {runs} runs after {row.warmup} in each, {threads} threads that sleep "
            f"when they wait, {row.dtype} on {row.device}; "
            f"{row.machine}"
        )
        if self.busy <= BUSY:
            return said
        return (
            f"{said}\nthe machine was busy: threads waited for a processor for {self.busy:.0%} of the "
            "time; close other programs and measure again"
        )

    def __str__(self) -> str:
        return f"{table(*self.table())}\n{self.how()}"


@checked
def benchmark(
    candidates: Sequence[Candidate],
    *,
    threads: Sequence[Threads] = (1,),
    rounds: Times = 3,
    runs: Times = 7,
    warmup: Warmup = 2,
    compared: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Time candidates, one per process.

    Two runtimes in one process, or threads that wait actively, slow each other down. Here every
    candidate is loaded into a fresh process with a fixed number of threads that sleep when they have
    nothing to do, is called a few times and leaves; rounds of such processes take turns, a b c a b c,
    so that drift of the machine hits all alike.

    Args:
        candidates: what is timed; ratios are relative to the first.
        threads: numbers of threads.
        rounds: processes of every candidate at every number of threads.
        runs: timed calls in a process.
        warmup: calls before them.
        compared: compare the outputs of the candidates with those of the first.
        progress: called after every process.

    Returns:
        Times over all rounds; a ratio is the median over the rounds of (median time in the round /
        that of the first candidate in the same round).

    Raises:
        ValueError: no candidates, two of one name, numbers below 1 (a warm-up below 0), a function
            that another process cannot import, or a candidate that refuses to be loaded or called.
        RuntimeError: a candidate failed; the message ends with what its process said.
    """
    _check(candidates, threads)
    cases = [(c, n) for n in threads for c in candidates]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {(c.name, n): [] for c, n in cases}
    errors = {}
    with tempfile.TemporaryDirectory(prefix="effformer.") as folder:
        for turn in range(rounds):
            for i, (candidate, count) in enumerate(cases):
                kept = compared and turn == 0 and count == threads[0]
                path = str(Path(folder) / f"{candidates.index(candidate)}.safetensors")
                job = {
                    "threads": count,
                    "runs": runs,
                    "warmup": warmup,
                    "outputs": path if kept else None,
                }
                found[candidate.name, count].append(_run(candidate, job))
                if progress is not None:
                    progress(turn * len(cases) + i + 1, rounds * len(cases))
        if compared:
            errors = _errors([c.name for c in candidates], Path(folder))
    sides = {n: _side(candidates, n, found, warmup) for n in threads}
    return Benchmark(sides=sides, errors=errors, rounds=rounds)


def _check(candidates: Sequence[Candidate], threads: Sequence[int]) -> None:
    names = [c.name for c in candidates]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"benchmark: candidates need different names, got {names}")
    if not threads:
        raise ValueError("benchmark: threads is empty; give numbers such as (1, 2)")
    for candidate in candidates:
        load = candidate.load
        if load.__module__ == "__main__" or "<" in load.__qualname__:
            raise ValueError(
                f"benchmark: {candidate.name!r}: another process cannot import {load.__qualname__} of "
                f"{load.__module__}; give a function of a module"
            )


def _run(candidate: Candidate, job: dict[str, Any]) -> dict[str, Any]:
    """Time one candidate in a process of its own."""
    load = candidate.load
    words = {"load": f"{load.__module__}:{load.__qualname__}", "options": dict(candidate.options)}
    count = str(job["threads"])
    place = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, **QUIET}
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "effformer.profile.worker"],
        input=json.dumps(job | words), capture_output=True, text=True, check=False,
        env=os.environ | place | {"PYTHONPATH": paths},
    )  # fmt: skip
    answer = json.loads(done.stdout) if done.returncode == 0 else {}
    if "refused" in answer:
        raise ValueError(f"benchmark: {candidate.name!r}: {answer['refused']}")
    if "samples" not in answer:
        said = done.stderr.strip()[-2000:] or f"it ended with code {done.returncode}"
        raise RuntimeError(f"benchmark: the process of {candidate.name!r} failed: {said}")
    result: dict[str, Any] = answer
    return result


def _errors(names: list[str], folder: Path) -> dict[str, float]:
    """Largest relative difference from the outputs of the first candidate."""
    from safetensors.torch import load_file

    kept = [load_file(folder / f"{i}.safetensors") for i in range(len(names))]
    if not any(bool(x.any()) for x in kept[0].values()):
        return {}
    return {name: _distance(one, kept[0], name) for name, one in zip(names, kept, strict=True)}


def _distance(one: Mapping[str, Tensor], first: Mapping[str, Tensor], name: str) -> float:
    shapes, wanted = ([tuple(x.shape) for x in some.values()] for some in (one, first))
    if shapes != wanted:
        raise ValueError(
            f"benchmark: {name!r} returns {shapes}, the first candidate {wanted}; they cannot be compared"
        )
    differences = [
        (x.double() - first[k].double()).abs().max()
        / first[k].double().abs().max().clamp_min(1e-30)
        for k, x in one.items()
        if x.numel()
    ]
    return float(torch.stack(differences).max()) if differences else 0.0


def _side(
    candidates: Sequence[Candidate],
    threads: int,
    found: Mapping[tuple[str, int], list[dict[str, Any]]],
    warmup: int,
) -> SideBySide:
    """The candidates at one number of threads."""
    rows, middles = {}, {}
    for candidate in candidates:
        answers = found[candidate.name, threads]
        rows[candidate.name] = _latency(candidate, answers, threads, warmup)
        middles[candidate.name] = [median(a["samples"]) for a in answers]
    first = middles[candidates[0].name]
    ratios = {
        name: median(a / b for a, b in zip(own, first, strict=True))
        for name, own in middles.items()
    }
    return SideBySide(rows, ratios)


def _latency(
    candidate: Candidate, answers: Sequence[dict[str, Any]], threads: int, warmup: int
) -> Latency:
    samples = tuple(s for answer in answers for s in answer["samples"])
    p10, middle, p90 = percentiles(samples)
    facts = answers[0]["machine"]
    return Latency(
        name=candidate.name, median=middle, p10=p10, p90=p90, runs=len(samples), warmup=warmup,
        threads=threads, dtype=candidate.dtype, device=candidate.device, form=candidate.form,
        machine=Machine(**facts | {"flags": tuple(facts["flags"])}), samples=samples,
        memory=max(answer["memory"] for answer in answers),
        waited=max(answer["waited"] for answer in answers),
    )  # fmt: skip
