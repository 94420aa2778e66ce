"""CPU time on one thread: what the processor worked, whatever else the machine does meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from time import process_time
from typing import Any

import torch

from effformer.profile import Machine, machine

__all__ = ["Turns", "take_turns"]


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Candidates that took turns.

    Attributes:
        seconds: name -> CPU seconds of every call.
        machine: where.
    """

    seconds: dict[str, list[float]]
    machine: Machine

    def ratio(self, name: str) -> float:
        """Median over the rounds of its time over that of the first candidate."""
        first = next(iter(self.seconds.values()))
        return median(a / b for a, b in zip(self.seconds[name], first, strict=True))

    def median(self, name: str) -> str:
        return f"{1e3 * median(self.seconds[name]):.4g} ms"

    def spread(self, name: str) -> str:
        values = self.seconds[name]
        cuts = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
        return f"{1e3 * cuts[0]:.4g} to {1e3 * cuts[-1]:.4g}"


def take_turns(
    calls: Mapping[str, Callable[[], Any]], *, runs: int, gradients: bool = False
) -> Turns:
    """Time a b c a b c ... on one thread, after one call of each."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode(not gradients):
        for call in calls.values():
            call()
        for _ in range(runs):
            for name, call in calls.items():
                start = process_time()
                call()
                seconds[name].append(process_time() - start)
    return Turns(seconds=seconds, machine=machine())
