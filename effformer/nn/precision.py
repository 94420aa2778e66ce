"""Sums over many tokens in float32 at least, whatever the precision around them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["exactly", "running_mean", "widened"]


def widened(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exactly(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of x: it would round the factors of every product again."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def running_mean(x: Tensor, total: Tensor | None = None, count: int = 0) -> tuple[Tensor, Tensor]:
    """Means up to every token of a sequence that may go on.

    Args:
        x: the next tokens (B, N, D).
        total: sum (B, D) of those before, None for none.
        count: their number.

    Returns:
        The means (B, N, D), of the dtype of x, and the sum (B, D) of all, in float32 at least.
    """
    totals = widened(x).cumsum(dim=1)
    totals = totals if total is None else total[:, None] + totals
    counts = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=totals.dtype) + count
    return (totals / counts[:, None]).to(x.dtype), totals[:, -1]
