"""Stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DropPath"]


class DropPath(nn.Module):
    """Drop a whole branch per sample with probability ``p`` in training, and rescale the others by
    1 / (1 - p).

    Args:
        p: probability in [0, 1).
        generator: source of randomness; None means torch's default generator, as `nn.Dropout` does.

    Reference: Deep Networks with Stochastic Depth, 2016, arXiv 1603.09382.
    """

    def __init__(self, p: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"drop_path: {p} is outside [0, 1)")
        self.p = p
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or self.p == 0:
            return x
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        keep = torch.rand(shape, dtype=x.dtype, device=x.device, generator=self.generator) >= self.p
        return x * keep / (1 - self.p)
