"""Efficient attention: keys are normalised over tokens, queries over channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effformer.context import EMPTY, Context
from effformer.registry import Caps, core

from .base import Core, CoreConfig
from .slices import over_heads

__all__ = ["Efficient"]


@core.register(
    "efficient",
    caps=Caps(cross=True, joint=True, mask="key", packed=True, width=True),
    paper="1812.01243",
)
class Efficient(Core):
    """Efficient attention: ``softmax_channels(q) (softmax_tokens(k)^T v)``.

    Every key channel is one global map over the tokens; queries mix the K summaries. It is also
    called "linear attention" in several packages, and is Performer's form without projection.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Efficient Attention: Attention with Linear Complexities, 2018, arXiv 1812.01243.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        """Knobs of `Efficient`."""

        def __post_init__(self) -> None:
            if self.causal:
                raise ValueError("efficient: has no causal form; use linear, performer or flow")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        mask = None if ctx.mask is None else ctx.mask[:, None, :, None]

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if mask is not None:
                k = k.masked_fill(~mask, torch.finfo(k.dtype).min)
                v = v * mask
            return q.softmax(dim=-1) @ (k.softmax(dim=2).mT @ v)

        return over_heads(mix, q, k, v)

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        return heads * (n + (n if m is None else m)) * head_dim**2
