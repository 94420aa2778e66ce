"""A short depth-wise convolution along the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cut import put, twin

__all__ = ["ShortConv"]


class ShortConv(nn.Module):
    """``silu(sum_i w_i x_(t - T + 1 + i) + b)`` for every channel alone; the last tap is the token.

    Args:
        channels: number of channels.
        taps: number T of taps.
        bias: there is a bias.
        both: add the same filter from the other side, which counts the token once.
    """

    def __init__(self, channels: int, taps: int = 4, *, bias: bool = False, both: bool = False):
        super().__init__()
        self.taps, self.both = taps, both
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.uniform_(self.weight, -(taps**-0.5), taps**-0.5)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, N, C) to the same shape, and the last T - 1 inputs (B, T - 1, C)."""
        if state is None:
            state = self.init_state(x.shape[0], like=x)
        joined = torch.cat([state.to(x.dtype), x], dim=1)
        y = F.conv1d(joined.mT, self.weight, self.bias, groups=self.weight.shape[0]).mT
        if self.both:
            back = F.pad(x.mT, (0, self.taps - 1))
            y = y + F.conv1d(back, self.weight.flip(-1), groups=self.weight.shape[0]).mT
            y = y - x * self.weight[:, 0, -1]
        return F.silu(y), joined[:, x.shape[1] :]

    def init_state(self, batch: int, *, like: Tensor) -> Tensor:
        """Nothing before the first token."""
        return like.new_zeros(batch, self.taps - 1, self.weight.shape[0])

    def select(self, channels: Tensor) -> ShortConv:
        """The filters of some channels."""
        small = twin(self)
        put(small, "weight", self.weight.index_select(0, channels))
        if self.bias is not None:
            put(small, "bias", self.bias.index_select(0, channels))
        return small

    def macs(self, n: int) -> int:
        """Multiply-adds for n tokens."""
        return n * self.weight.shape[0] * self.taps * (2 if self.both else 1)
