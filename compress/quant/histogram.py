"""Streaming histograms of activations and the ranges that they suggest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Histogram", "entropy_range", "percentile_range"]

BINS = 2048
"""Bins on each side of zero."""

_STRIDE = 16  # bins from one candidate of a range to the next


class Histogram:
    """Counts of values in equal bins on both sides of zero, in constant memory.

    The range is a power of two. A value beyond it doubles the range, and two neighbouring bins become
    one, which is exact: the result depends neither on the order nor on the cut of the data.

    Attributes:
        counts: (2, `BINS`) int64; negative values, then the others, from zero outwards.
        reach: end of the last bin, a power of two; 0 before the first value that is not zero.
        low: smallest value.
        high: largest value.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, BINS, dtype=torch.int64)
        self.reach = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, x: Tensor) -> None:
        """Count values of any shape."""
        x = x.detach().flatten().double().cpu()
        if not len(x):
            return
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self._widen(float(x.abs().max()))
        width = self.reach / BINS if self.reach else 1.0
        place = (x.abs() / width).long().clamp(max=BINS - 1)
        place += BINS * (x >= 0)
        self.counts += torch.bincount(place, minlength=2 * BINS).view(2, BINS)

    def merge(self, other: Histogram) -> None:
        """Count what another histogram has counted."""
        counts, reach = other.counts, other.reach
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._widen(reach / 1.5 if reach else 0.0)
        while reach and reach < self.reach:
            counts, reach = _halved(counts), reach * 2
        self.counts += counts

    def _widen(self, top: float) -> None:
        if top <= 0:
            return
        if not self.reach:  # zeros alone lie in the first bin of any range
            self.reach = 2.0 ** math.ceil(math.log2(top))
        while self.reach < top:
            self.counts, self.reach = _halved(self.counts), self.reach * 2

    def line(self) -> tuple[Tensor, Tensor]:
        """Counts from the lowest bin to the highest, and their edges (one more, float64)."""
        counts = torch.cat([self.counts[0].flip(0), self.counts[1]])
        reach = self.reach or 1.0
        return counts, torch.linspace(-reach, reach, 2 * BINS + 1, dtype=torch.float64)

    def range(self, rule: str, percentile: float) -> tuple[float, float]:
        """Ends of the range that quantization should span, 0 included.

        Args:
            rule: "minmax", "percentile" or "entropy".
            percentile: percent of the values inside, for "percentile".
        """
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if rule == "minmax" or not self.reach:
            return low, high
        counts, edges = self.line()
        if rule == "percentile":
            found = percentile_range(counts, edges, percentile)
        else:
            found = entropy_range(counts, edges, stride=_STRIDE)
        return max(min(found[0], 0.0), low), min(max(found[1], 0.0), high)


def _halved(counts: Tensor) -> Tensor:
    pairs = counts.unflatten(1, (-1, 2)).sum(2)
    return torch.cat([pairs, torch.zeros_like(pairs)], dim=1)


def percentile_range(counts: Tensor, edges: Tensor, percentile: float) -> tuple[float, float]:
    """Ends between which ``percentile`` percent of the values lie, as many beyond either end.

    Args:
        counts: (bins,) int64.
        edges: (bins + 1,) float64.
        percentile: in (0, 100].
    """
    share = counts.double().cumsum(0) / counts.sum()
    beyond = torch.tensor([(100.0 - percentile) / 200.0, 1.0 - (100.0 - percentile) / 200.0])
    low, high = torch.searchsorted(share, beyond.double()).clamp(max=len(counts) - 1).tolist()
    return float(edges[low]), float(edges[high])


def entropy_range(
    counts: Tensor, edges: Tensor, *, levels: int = 128, stride: int = 1, spread_whole: bool = False
) -> tuple[float, float]:
    """Symmetric range whose rounded distribution is nearest to the counted one.

    For every range around the middle, P is the histogram inside with the rest in its end bins; Q has
    the counts inside (without the rest) in ``levels`` steps, spread over the bins of each step; the
    range with the least ``KL(P || Q)`` of both, smoothed, is taken.

    Args:
        counts: (bins,) int64, the middle of the bins is zero.
        edges: (bins + 1,) float64.
        levels: steps on the whole range.
        stride: bins from one candidate to the next.
        spread_whole: as ONNX Runtime's calibrator: a step is spread in whole numbers over all of its
            bins, empty ones too; False spreads fractions over those that are not empty.

    Reference: 8-bit Inference with TensorRT, 2017 (GTC talk of S. Migacz).
    """
    bins, middle = len(counts), len(counts) // 2
    counts = counts.double()
    best, found = math.inf, (float(edges[0]), float(edges[-1]))
    for half in range(levels // 2, middle + 1, stride):
        start, stop = middle - half, min(middle + half + 1, bins)
        inside = counts[start:stop]
        p = inside.clone()
        p[0] += counts[:start].sum()
        p[-1] += counts[stop:].sum()
        divergence = _divergence(p, _stepped(inside, p, levels, spread_whole))
        if divergence < best:
            best, found = divergence, (float(edges[start]), float(edges[stop]))
    return found


def _stepped(inside: Tensor, p: Tensor, levels: int, whole: bool) -> Tensor:
    """The counts inside, in steps, spread back over their bins."""
    merged = len(inside) // levels
    cut = levels * merged
    sums = inside[:cut].view(levels, merged).sum(1)
    sums[-1] += inside[cut:].sum()
    filled = (p[:cut].view(levels, merged) != 0).double()
    filled_counts = filled.sum(1)
    if not whole and len(inside) > cut:
        filled_counts = filled_counts.clone()
        filled_counts[-1] += (p[cut:] != 0).sum()
    each = torch.where(
        filled_counts > 0, sums / filled_counts.clamp(min=1), torch.zeros(1).double()
    )
    if whole:
        spread = each.floor()[:, None].expand(levels, merged).flatten()
        return torch.cat([spread, inside.new_zeros(len(inside) - cut)])
    tail = each[-1] * (p[cut:] != 0)
    return torch.cat([(each[:, None] * filled).flatten(), tail])


def _divergence(p: Tensor, q: Tensor) -> float:
    smooth = [one for one in (_smoothed(p), _smoothed(q)) if one is not None]
    if len(smooth) < 2:
        return math.inf
    a, b = (one / one.sum() for one in smooth)
    return float((a * (a / b).log()).sum())


def _smoothed(x: Tensor, eps: float = 1e-4) -> Tensor | None:
    """``eps`` in place of zeros, taken from the others."""
    zeros = x == 0
    others = int((~zeros).sum())
    if not others:
        return None
    taken = eps * int(zeros.sum()) / others
    if taken >= 1.0:
        return None
    return torch.where(zeros, torch.full_like(x, eps), x - taken)
