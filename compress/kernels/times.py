"""How long calls take, side by side, and what of it is remembered of this machine."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from effformer.checks import FormatError
from effformer.files import atomic_path, mark, read_json
from effformer.profile import machine

__all__ = ["Times", "fastest", "measured", "several"]

T = TypeVar("T")
KERNELS = "kernels"
_TURNS = 8


def several(layers: T) -> list[T]:
    """Copies to time in turn: in a whole model weights come from memory, and a single layer's would
    come from the cache that the call before has filled.
    """
    return [layers, *(copy.deepcopy(layers) for _ in range(3))]


def measured(candidates: Mapping[T, Sequence[Callable[[], object]]]) -> dict[T, float]:
    """Seconds of a call of every candidate: the median over turns in which all calls are made."""
    times: dict[T, list[float]] = {form: [] for form in candidates}
    with torch.inference_mode():
        for turn in range(_TURNS):
            for form, calls in candidates.items():
                start = time.perf_counter()
                for call in calls:
                    call()
                if turn:  # the first turn warms up
                    times[form].append((time.perf_counter() - start) / len(calls))
    return {form: statistics.median(found) for form, found in times.items()}


def fastest(candidates: Mapping[T, Sequence[Callable[[], object]]]) -> T:
    """The candidate whose calls take the least time; candidates take turns."""
    times = measured(candidates)
    return min(times, key=lambda form: times[form])


class Times:
    """Seconds of forms of layers by shape, kept in a file of this machine.

    The processor, its vector extensions, the number of threads and the versions of the runtimes name the
    file and stand in it. A file that does not fit or cannot be read is ignored with one sentence, and
    written anew; one that cannot be written is done without.

    Args:
        folder: where the file lies; None: ``effformer`` in the user's cache folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.facts = _facts()
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:12]
        self.path = (_place() if folder is None else Path(folder)) / f"kernels-{digest}.json"
        self.known = self._read()
        self.new = False

    def _read(self) -> dict[str, dict[str, float]]:
        if not self.path.exists():
            return {}
        try:
            data = read_json(self.path)
            told, times = data["machine"], data["times"]
            sound = all(
                isinstance(seconds, float) and 0 < seconds < 3600
                for forms in times.values()
                for seconds in forms.values()
            )
        except (FormatError, KeyError, TypeError, AttributeError):
            told, times, sound = self.facts, {}, False
        if told != self.facts:
            self._ignored("was measured on another machine or with other versions")
            return {}
        if not sound:
            self._ignored("is damaged")
            return {}
        found: dict[str, dict[str, float]] = times
        return found

    def _ignored(self, why: str) -> None:
        warnings.warn(
            f"choose_kernels: {self.path} {why}; it is ignored, and kernels are timed again",
            stacklevel=2,
        )

    def of(
        self, key: str, candidates: Mapping[str, Callable[[], Sequence[Callable[[], object]]]]
    ) -> dict[str, float]:
        """Seconds of every candidate; what is not known of one is measured, side by side for all.

        Args:
            key: of the shape.
            candidates: name -> what makes its calls.
        """
        known = self.known.get(key, {})
        if not candidates.keys() <= known.keys():
            known = measured({name: make() for name, make in candidates.items()})
            self.known[key] = self.known.get(key, {}) | known
            self.new = True
        return {name: known[name] for name in candidates}

    def save(self) -> None:
        """Write what is new."""
        if not self.new:
            return
        data = {"generator": mark(KERNELS), "machine": self.facts, "times": self.known}
        try:
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        except FormatError:
            return  # a home that cannot be written: measured again next time
        self.new = False


def _place() -> Path:
    """The user's cache folder."""
    given = os.environ.get("XDG_CACHE_HOME")
    base = Path(given) if given else Path.home() / ".cache"
    return base / "effformer"


def _facts() -> dict[str, Any]:
    """What times depend on."""
    found = machine()
    return {
        "cpu": found.cpu, "flags": list(found.flags), "capability": found.capability,
        "threads": found.threads, "torch": found.torch, "system": found.system,
        "onnxruntime": _version("onnxruntime"), "bitsandbytes": _version("bitsandbytes"),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
