"""How straight a flow is, and how far its samples lie from data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..arguments import Shape, checked
from ..values import Real
from .paths import widened

__all__ = ["frechet_distance", "straightness"]

Features = Annotated[Tensor, Shape("(N, D)")]


@checked
def straightness(
    trajectory: Annotated[Tensor, Shape("(S, B, ...)")],
    times: Sequence[Real] | None = None,
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
    if trajectory.shape[0] < 2:
        raise ValueError(f"straightness: expected (N + 1, B, ...), got {tuple(trajectory.shape)}")
    steps = trajectory.shape[0] - 1
    if times is None:
        times = [i / steps for i in range(steps + 1)]
    if len(times) != steps + 1:
        raise ValueError(f"straightness: {steps + 1} states have {len(times)} times")
    ahead = [(b - a) * (times[-1] - times[0]) for a, b in pairwise(times)]
    if min(ahead) <= 0:
        raise ValueError(
            f"straightness: times must all increase or all decrease, got {list(times)}"
        )
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


@checked
def frechet_distance(features: Features, others: Annotated[Tensor, Shape("(M, D)")]) -> float:
    """How far two sets of features lie from each other, as normal distributions: 0 if means and
    covariances agree.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``, in float64. Few samples make it larger than it
    is of many; compare distances of equal numbers of samples.

    Args:
        features: (N, D) of generated samples, N > 1.
        others: (M, D) of real ones, M > 1.

    Raises:
        ValueError: another number of features, fewer than two samples, or numbers that are not
            finite.

    Reference: GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium,
    2017, arXiv 1706.08500. There the features are those of Inception-v3; distances in other features
    are not comparable with published ones.
    """
    if min(len(features), len(others)) < 2:
        raise ValueError(
            f"frechet_distance: at least two samples have a covariance, got {len(features)} and "
            f"{len(others)}"
        )
    one, other = features.detach().cpu().double(), others.detach().cpu().double()
    if not (one.isfinite().all() and other.isfinite().all()):
        raise ValueError("frechet_distance: there are features that are not finite")
    shift = (one.mean(0) - other.mean(0)).square().sum()
    first, second = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (one, other))
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # the eigenvalues of C1 C2 are those of C1^(1/2) C2 C1^(1/2), which is symmetric
    shared = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    return max((shift + first.trace() + second.trace() - 2 * shared).item(), 0.0)
