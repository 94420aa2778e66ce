"""Routers: what decides, from the time or from a token, whether something runs.

Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from effformer.context import Context

from .gates import GateLinear, Switch

__all__ = ["TimeRouter", "TokenRouter"]


class TimeRouter(nn.Module):
    """Which of U units run at a time: ``[1, G(W e_t + b)]``; the first always does.

    Args:
        time_dim: width of the time embedding.
        units: U, at least 2.
        bias: initial b; large values switch everything on.
        switch: G; its path is the name for `Tap`.

    Raises:
        ValueError: fewer than two units.
    """

    def __init__(self, time_dim: int, units: int, switch: Switch, *, bias: float) -> None:
        super().__init__()
        if units < 2:
            raise ValueError(f"{switch.path}: a gate needs at least 2 units, got {units}")
        self.router = GateLinear(time_dim, units - 1, start=bias)
        self.switch = switch

    def forward(self, ctx: Context) -> Tensor:
        """Zeros and ones (B, U).

        Raises:
            ValueError: the context carries no time embedding.
        """
        if ctx.time is None:
            raise ValueError(f"{self.switch.path}: ctx.time is None, but the gate reads the time")
        return F.pad(self.switch(self.router(ctx.time), ctx), (1, 0), value=1.0)

    def macs(self) -> int:
        """Multiply-adds of one sample."""
        return self.router.in_features * self.router.out_features


class TokenRouter(nn.Module):
    """Which tokens a branch works on: ``G(W2 relu(W1 x))`` of the raw residual stream.

    Args:
        dim: width of the tokens.
        hidden: width between the two layers.
        bias: initial bias of the last one; large values keep every token.
        switch: G; its path is the name for `Tap`.
    """

    def __init__(self, dim: int, hidden: int, switch: Switch, *, bias: float) -> None:
        super().__init__()
        self.fc1 = GateLinear(dim, hidden)
        self.fc2 = GateLinear(hidden, 1, start=bias)
        self.switch = switch

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Zeros and ones (B, N, 1) for tokens (B, N, D)."""
        out: Tensor = self.switch(self.fc2(F.relu(self.fc1(x))), ctx)
        return out

    def macs(self, n: int) -> int:
        """Multiply-adds for n tokens."""
        return n * (self.fc1.in_features + 1) * self.fc1.out_features
