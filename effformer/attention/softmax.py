"""Softmax attention, and the backends that evaluate it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from effformer.context import EMPTY, Context
from effformer.registry import Caps, core
from effformer.values import Positive

from .backends import attend, attend_packed
from .base import Core, CoreConfig

__all__ = ["Softmax", "SoftmaxState"]


class SoftmaxState(NamedTuple):
    """Keys and values seen so far, (B, H, M, K) and (B, H, M, V)."""

    k: Tensor
    v: Tensor


@core.register(
    "softmax",
    caps=Caps(
        causal="optional",
        cross=True,
        order_free=True,
        mask="full",
        rope=True,
        packed=True,
        streaming=True,
        width=True,
        sizes=True,
        cost="n^2",
    ),
    paper="1706.03762",
)
class Softmax(Core):
    """Softmax attention: ``softmax(scale * q k^T + mask) v``.

    A query that may attend to nothing (fully masked row) yields zeros. A key that stands for s
    merged ones counts as s keys: ``log s`` is added to its scores.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Attention Is All You Need, 2017, arXiv 1706.03762.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        """Knobs of `Softmax`.

        Attributes:
            backend: "sdpa" (torch's fused operator), "xformers" (CUDA only) or "reference"
                (explicit products).
            scale: factor of the scores; None means K^-0.5.
        """

        backend: Literal["sdpa", "xformers", "reference"] = "sdpa"
        scale: Positive | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        mask = ctx.mask
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None, :]
        sizes = None if ctx.merging is None else ctx.merging.weights
        bias = None if sizes is None else sizes.log()[:, None, None, :].to(q.dtype)
        config = self.config
        return attend(
            config.backend, q, k, v, mask, causal=config.causal, scale=config.scale, bias=bias
        )

    def packed(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, **further: Tensor) -> Tensor:
        if self.config.backend != "xformers" or ctx.packing is None:
            return super().packed(q, k, v, ctx)
        ctx.packing.check_row(q, dim=2)
        lengths, config = ctx.packing.lengths, self.config
        return attend_packed(q, k, v, lengths, causal=config.causal, scale=config.scale)

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        return 2 * heads * head_dim * n * (n if m is None else m)

    def init_state(self, batch: int, *, heads: int, head_dim: int, like: Tensor) -> SoftmaxState:
        """An empty cache of keys and values."""
        empty = like.new_zeros(batch, heads, 0, head_dim)
        return SoftmaxState(empty, empty)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: SoftmaxState, ctx: Context = EMPTY
    ) -> tuple[Tensor, SoftmaxState]:
        """Attend from the next tokens to everything seen; the state grows with the number of
        tokens.
        """
        past, new = state.k.shape[2], q.shape[2]
        k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
        rows = torch.arange(new, device=q.device)[:, None] + past
        mask = rows >= torch.arange(past + new, device=q.device)
        out = attend(self.config.backend, q, k, v, mask, causal=False, scale=self.config.scale)
        return out, SoftmaxState(k, v)
