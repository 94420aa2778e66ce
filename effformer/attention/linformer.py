"""Linformer: keys and values are projected along the sequence to a fixed number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.checks import CapabilityError
from effformer.context import EMPTY, Context
from effformer.registry import Caps, core
from effformer.site import Site
from effformer.values import Count

from .backends import fused
from .base import Core, CoreConfig

__all__ = ["Linformer"]


@core.register(
    "linformer",
    caps=Caps(cross=True, mask="key", rope=True, packed=True, width=True, cost="n"),
    paper="2006.04768",
)
class Linformer(Core):
    """Linformer: ``softmax(K^-0.5 q (E^T k)^T) (F^T v)`` with learned E, F of (tokens, projected).

    E and F are shared by the heads of a layer; fewer tokens use their first rows, more are
    refused. With a key mask row i belongs to the i-th valid token, so padding on either side
    changes nothing. Rotary positions turn keys before the projection: its slots have no place. No
    causal form exists: every projected key mixes all positions.

    Differs from the paper: masks (not in the paper); E and F are not shared across layers.

    Args:
        config: the knobs.
        site: the place in the model; ``site.length`` is the most tokens if the config does not say.

    Raises:
        CapabilityError: neither config nor model fixes the number of keys.
        ValueError: at call, more keys than rows.

    Reference: Linformer: Self-Attention with Linear Complexity, 2020, arXiv 2006.04768.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        """Knobs of `Linformer`.

        Attributes:
            tokens: most keys; None means the model's number of tokens (self-attention).
            projected: number of projected keys and values.
            share: E also projects the values; "none" or "key-value".
        """

        tokens: Count | None = None
        projected: Count = 256
        share: Literal["none", "key-value"] = "none"

        def check(self) -> None:
            if self.causal:
                raise ValueError("linformer: has no causal form; use linear, performer or flow")

    def __init__(self, config: Linformer.Config, site: Site) -> None:
        super().__init__(config, site)
        own = site.length if site.memory_dim is None else None
        tokens = own if config.tokens is None else config.tokens
        if tokens is None:
            able = ", ".join(core.names(cost="n", cross=True, order_free=True, mask="key"))
            raise CapabilityError(
                f"{site.path or 'linformer'}: 'linformer' needs a fixed number of keys, which this "
                "model has not; give the most there will be, {'name': 'linformer', 'tokens': 512}; "
                f"choices: {able}"
            )
        self.tokens = tokens
        self.key = nn.Parameter(torch.empty(tokens, config.projected))
        if config.share == "none":
            self.value = nn.Parameter(torch.empty(tokens, config.projected))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-projected^-0.5, as the published code draws them."""
        bound = self.config.projected**-0.5
        for matrix in self.parameters():
            nn.init.uniform_(matrix, -bound, bound)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        if k.shape[2] > self.tokens:
            raise ValueError(
                f"{self.site.path or 'linformer'}: {k.shape[2]} keys, but it was built for at most "
                f"{self.tokens}; build it with more tokens, or use linear, performer or flow"
            )
        first = self._rows(self.key, k, ctx.mask)
        second = first if self.config.share == "key-value" else self._rows(self.value, v, ctx.mask)
        return fused(q, first.mT @ k, second.mT @ v)

    def _rows(self, matrix: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The rows of a projection that stand for the tokens of x, (P, M, L) with P 1 or (B, 1)."""
        if mask is None:
            return matrix[: x.shape[2]]
        rank = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return (F.embedding(rank, matrix) * mask[..., None])[:, None]

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        return heads * 2 * self.config.projected * head_dim * (n + (n if m is None else m))
