"""How straight a flow is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .paths import widened

__all__ = ["straightness"]


def straightness(
    trajectory: Tensor,
    times: Sequence[float] | None = None,
    *,
    reduce: Literal["sum", "mean"] = "sum",
    per_sample: bool = False,
) -> Tensor:
    """How far a trajectory is from straight lines at constant speed: 0 if it is that.

    The paper's S = int_0^1 E |(Z_1 - Z_0) - dZ_t/dt|^2 dt.

    With N steps of width dt_i: ``sum_i dt_i |(z_N - z_0) / sum(dt) - (z_i - z_{i-1}) / dt_i|^2 /
    sum(dt)``.

    Args:
        trajectory: (N + 1, B, ...) states, as in ``SampleResult.trajectory``.
        times: (N + 1) their times; None: equal steps.
        reduce: over the elements of a sample, "sum" (the paper's squared norm) or "mean".
        per_sample: return (B,) instead of the mean over the batch.

    Raises:
        ValueError: fewer than two states, or another number of times than states.

    Reference: Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow,
    2022, arXiv 2209.03003.
    """
    if trajectory.dim() < 2 or trajectory.shape[0] < 2:
        raise ValueError(f"straightness: expected (N + 1, B, ...), got {tuple(trajectory.shape)}")
    steps = trajectory.shape[0] - 1
    if times is None:
        times = [i / steps for i in range(steps + 1)]
    if len(times) != steps + 1:
        raise ValueError(f"straightness: {steps + 1} states have {len(times)} times")
    trajectory = widened(trajectory)
    clock = torch.tensor(times, dtype=torch.float64)
    total = clock[-1] - clock[0]
    # a straight line through the ends takes the share dt / total of the way in each step
    share = (clock.diff() / total).to(trajectory).view(-1, *(1,) * (trajectory.dim() - 1))
    chord = (trajectory[-1] - trajectory[0]) / total.to(trajectory)
    speed = trajectory.diff(dim=0) / (share * total.to(trajectory))
    squares = (share * (chord - speed).square()).sum(0).flatten(1)
    values = squares.sum(1) if reduce == "sum" else squares.mean(1)
    return values if per_sample else values.mean()
