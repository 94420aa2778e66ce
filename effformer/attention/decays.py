"""Initial values of learned decays."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["start_bias", "start_rates"]


def start_rates(heads: int, *, low: float) -> Tensor:
    """``A = log U(low, 16)``, (H,)."""
    return torch.empty(heads).uniform_(low, 16.0).clamp(min=1e-4).log()


def start_bias(count: int) -> Tensor:
    """``c`` with ``softplus(c) = exp(U(log 0.001, log 0.1))``, at least 1e-4."""
    time = torch.empty(count).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
    return time + (-torch.expm1(-time)).log()
