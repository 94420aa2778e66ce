"""Which form of a bundle is fastest on this machine: timed once, remembered beside the bundle. Needs numpy and
onnxruntime alone; this file also lies in every bundle, beside `effformer.export.run`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__:
    from .pictures import BundleError
else:  # in a bundle, whose runner has made its folder known
    from pictures import BundleError  # type: ignore[import-not-found, no-redef]

__all__ = ["CHOICE", "Choice", "choose", "open_session", "place_of"]

CHOICE = "choice.json"
LONGEST = 2**16  # bytes of a file of ours
FASTER = 0.95  # share of the time that a form must keep to be taken in place of an earlier one
SECONDS, LEAST, MOST = 0.2, 3, 50  # of a timing, and its calls


@dataclass(frozen=True)
class Choice:
    """A form, and why it was taken.

    Attributes:
        form: its name.
        times: seconds of one evaluation of the velocity of two samples, by form; the least of several.
        out: forms that do not run here, or do not agree with the record, and why.
        forgotten: why the choice holds for this process alone; empty if it is remembered.
    """

    form: str
    times: dict[str, float]
    out: dict[str, str]
    forgotten: str = ""

    def __str__(self) -> str:
        spent = {name: f"{1e3 * seconds:.3g} ms" for name, seconds in self.times.items()}
        first = next(iter(self.times))
        if self.form == first:
            words = [
                f"{self.form} ({spent[self.form]} an evaluation): no other form is faster by 5 % here"
            ]
        else:
            share = self.times[first] / self.times[self.form]
            words = [
                f"{self.form} ({spent[self.form]} an evaluation): {share:.2g} times as fast as {first} here"
            ]
        words += [f"{name} takes {took}" for name, took in spent.items() if name != self.form]
        words += [f"{name} is out: {why}" for name, why in self.out.items()]
        words.append(
            f"not remembered: {self.forgotten}" if self.forgotten else f"remembered in {CHOICE}"
        )
        return "; ".join(words)


def open_session(path: Path, options: dict[str, Any], *, narrow: bool, alone: bool) -> Any:
    """A session of ONNX Runtime.

    Args:
        path: the graph.
        options: what a bundle records: ``threads`` (None: the choice of the runtime), ``spinning`` (threads
            wait actively), ``arena`` (memory is kept between calls), ``denormals_to_zero``.
        narrow: its signed weights have 7 bits, whose products no processor saturates.
        alone: nothing else runs in this process; denormals are flushed in this thread for good.

    Raises:
        BundleError: there is no onnxruntime, or it cannot load the graph.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BundleError(
            f"onnxruntime cannot be imported ({error}); pip install onnxruntime"
        ) from error
    made = ort.SessionOptions()
    made.intra_op_num_threads = options.get("threads") or 0
    made.enable_cpu_mem_arena = options.get("arena", True)
    made.log_severity_level = 4  # what it would print stands in its exceptions
    entries = {
        "session.intra_op.allow_spinning": options.get("spinning", True),
        "session.x64quantprecision": not narrow,  # signed bytes are widened where they would saturate
        "session.set_denormal_as_zero": alone and options.get("denormals_to_zero", False),
    }
    for name, value in entries.items():
        made.add_session_config_entry(name, str(int(value)))
    try:
        return ort.InferenceSession(str(path), made, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        why = f"onnxruntime {ort.__version__} cannot load it ({error})"
        raise BundleError(f"{path}: {why}") from error


def place_of(folder: Path, threads: int | None) -> dict[str, Any]:
    """What a choice hangs on: processor, runtime, threads, and the bundle."""
    import onnxruntime as ort

    name, flags = _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": name, "flags": flags, "cores": cores, "threads": threads, "onnxruntime": ort.__version__,
        "bundle": hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest(),
    }  # fmt: skip


def _processor() -> tuple[str, str]:
    """Name and flags of the processor; only Linux tells the flags without a package."""
    facts: dict[str, str] = {}
    with (
        contextlib.suppress(OSError),
        open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file,
    ):
        for line in file:
            key, _, value = line.partition(":")
            facts.setdefault(key.strip().lower(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, facts.get("flags") or facts.get("features") or ""


def choose(
    folder: Path, forms: Sequence[str], place: dict[str, Any], trial: Callable[[str], Callable[[], Any]]
) -> Choice:  # fmt: skip
    """The form that was taken here before, or the fastest of all.

    Args:
        folder: the bundle.
        forms: names, the preferred ones first.
        place: see `place_of`.
        trial: opens a form in a fresh session, compares it with the record, and gives what evaluates it
            once.

    Raises:
        BundleError: none of them runs here.
    """
    if (known := _known(folder / CHOICE, forms, place)) is not None:
        return known
    times: dict[str, float] = {}
    out: dict[str, str] = {}
    for name in forms:
        try:
            times[name] = _least(trial(name))
        except BundleError as error:
            out[name] = " ".join(str(error).split())[:300]
    if not times:
        raise BundleError(f"{folder}: none of its forms runs here; {forms[0]}: {out[forms[0]]}")
    best = next(iter(times))
    for name, seconds in times.items():
        if seconds < FASTER * times[best]:
            best = name
    made = Choice(best, times, out)
    return replace(made, forgotten=_remember(folder / CHOICE, made, place))


def _least(call: Callable[[], Any]) -> float:
    """The least time of several calls."""
    least, count, end = math.inf, 0, time.perf_counter() + SECONDS
    while count < LEAST or (count < MOST and time.perf_counter() < end):
        start = time.perf_counter()
        call()
        least, count = min(least, time.perf_counter() - start), count + 1
    return least


def _known(path: Path, forms: Sequence[str], place: dict[str, Any]) -> Choice | None:
    """The remembered choice, if it was made on this machine and tells all that is needed."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LONGEST:
            return None
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(facts, dict) or facts.get("place") != place:
        return None
    form, times, out = (facts.get(name) for name in ("form", "times", "out"))
    if not isinstance(times, dict) or not isinstance(out, dict) or not isinstance(form, str):
        return None
    whole = form in times and sorted((*times, *out)) == sorted(forms)
    right = all(type(t) is float and 0 < t < math.inf for t in times.values())
    return (
        Choice(form, times, {n: str(why)[:300] for n, why in out.items()})
        if whole and right
        else None
    )


def _remember(path: Path, made: Choice, place: dict[str, Any]) -> str:
    """Write a choice; why that cannot be done, or nothing."""
    facts = {"place": place, "form": made.form, "times": made.times, "out": made.out}
    temporary = path.with_name(f".{CHOICE}-{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            json.dump(facts, file, indent=2)
        os.replace(temporary, path)
    except OSError as error:
        return f"{path} cannot be written ({error.strerror})"
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return ""
