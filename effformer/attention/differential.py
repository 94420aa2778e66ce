"""Differential attention: the difference of two softmax maps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effformer.context import EMPTY, Context
from effformer.registry import Caps, core
from effformer.site import Site
from effformer.values import Chance, Positive

from .backends import attend
from .base import Core, CoreConfig

__all__ = ["Differential"]


@core.register(
    "differential",
    caps=Caps(
        causal="optional",
        cross=True,
        order_free=True,
        mask="full",
        rope=True,
        packed=True,
        width=True,
        cost="n^2",
    ),
    paper="2410.05258",
)
class Differential(Core):
    """Differential attention: ``(1 - l0) rmsnorm((softmax(s q1 k1^T) - l softmax(s q2 k2^T)) v)``.

    ``q1, q2`` and ``k1, k2`` are the halves of each head's queries and keys, ``s = (K/2)^-0.5``;
    ``l = exp(lq1 . lk1) - exp(lq2 . lk2) + l0`` is learned, one number per layer, and starts near
    ``l0 = 0.8 - 0.6 exp(-0.3 layer)``. What both maps attend to cancels. Rotary positions turn each
    half by every second pair of the tables.

    Args:
        config: the knobs.
        site: the place in the model; ``site.dim / site.heads`` is the width K = V of a head.

    Raises:
        ValueError: heads of odd width.

    Reference: Differential Transformer, 2024, arXiv 2410.05258.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        """Knobs of `Differential`.

        Attributes:
            lambda_init: the constant l0; None means it depends on the layer as above.
            eps: epsilon of the norm.
        """

        lambda_init: Chance | None = None
        eps: Positive = 1e-5

    def __init__(self, config: Differential.Config, site: Site) -> None:
        super().__init__(config, site)
        width = site.dim // site.heads
        if width % 2:
            raise ValueError(
                f"{site.path or 'differential'}: heads of width {width} cannot be halved; "
                "use an even width"
            )
        constant = config.lambda_init
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * site.layer) if constant is None else constant
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(0.1 * torch.randn(width // 2)) for _ in range(4)
        )
        self.norm = nn.RMSNorm(width, eps=config.eps)

    rotates = "inside"
    counts_heads = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        mask = ctx.mask
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None, :]
        halves = zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True)
        if ctx.rope is not None:
            rope = ctx.rope.halved()
            halves = ((rope.query(a), rope.key(b)) for a, b in halves)  # type: ignore[assignment]
        first, second = (
            attend("sdpa", a, b, v, mask, causal=self.config.causal, scale=None) for a, b in halves
        )
        weight = (self.lambda_q1 * self.lambda_k1).sum().exp()
        weight = weight - (self.lambda_q2 * self.lambda_k2).sum().exp() + self.lambda_init
        return self.norm(first - weight * second) * (1 - self.lambda_init)

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        return 3 * heads * head_dim * n * (n if m is None else m)
