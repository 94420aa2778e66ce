"""How far one output is from another: sums over batches, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

__all__ = ["Distance"]


@dataclass(slots=True)
class Distance:
    """Sums over all batches so far.

    Attributes:
        square: of ``|y' - y|^2``.
        energy: of ``|y|^2``.
        cosines: of the cosine of every sample, tensors of an output alike.
        divergence: of the KL divergence of every row.
        count: cosines.
        rows: divergences.
    """

    square: float = 0.0
    energy: float = 0.0
    cosines: float = 0.0
    divergence: float = 0.0
    count: int = 0
    rows: int = 0

    def add(self, expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
        """Add the tensors of one batch."""
        for y, other in zip(expected, actual, strict=True):
            a, b = y.double(), other.double()
            self.square += float((b - a).square().sum())
            self.energy += float(a.square().sum())
            flat, changed = (x.reshape(len(x) if x.dim() else 1, -1) for x in (a, b))
            self.cosines += float(F.cosine_similarity(flat, changed, dim=1).sum())
            self.count += len(flat)
            if a.dim() in (2, 3) and a.shape[-1] > 1:
                p, q = (F.log_softmax(x, -1) for x in (a, b))
                self.divergence += float((p.exp() * (p - q)).sum())
                self.rows += a[..., 0].numel()

    @property
    def mse(self) -> float:
        """``|y' - y|^2 / |y|^2``; infinite if an output was."""
        if not math.isfinite(self.square):
            return math.inf
        return self.square / self.energy if self.energy else self.square

    @property
    def cosine(self) -> float:
        """Mean cosine of a sample."""
        found = self.cosines / self.count if self.count else 1.0
        return found if math.isfinite(found) else 0.0

    @property
    def kl(self) -> float | None:
        """Mean divergence of a row; None if no output has rows of classes."""
        if not self.rows:
            return None
        return self.divergence / self.rows if math.isfinite(self.divergence) else math.inf
