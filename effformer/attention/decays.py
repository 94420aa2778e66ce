"""Learned decays: their step widths, and initial values."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["start_bias", "start_rates", "step_width"]


def step_width(x: Tensor) -> Tensor:
    """``softplus(x)``. Of a contiguous copy: a captured graph takes the gradient's strides for those of
    the output, and torch gives it those of the input.
    """
    return F.softplus(x.contiguous())


def start_rates(heads: int, *, low: float) -> Tensor:
    """``A = log U(low, 16)``, (H,)."""
    return torch.empty(heads).uniform_(low, 16.0).clamp(min=1e-4).log()


def start_bias(count: int) -> Tensor:
    """``c`` with ``softplus(c) = exp(U(log 0.001, log 0.1))``, at least 1e-4."""
    time = torch.empty(count).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
    return time + (-torch.expm1(-time)).log()
