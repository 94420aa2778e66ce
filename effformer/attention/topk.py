"""Selective hard attention: every query keeps its best keys only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer.checks import CapabilityError
from effformer.context import EMPTY, Context
from effformer.registry import Caps, core
from effformer.values import Count

from .base import Core, CoreConfig
from .slices import known_length
from .softmax import SoftmaxState

__all__ = ["TopK"]

_ELEMENTS = 2**21


@core.register(
    "topk",
    caps=Caps(
        causal="optional",
        cross=True,
        order_free=True,
        mask="full",
        rope=True,
        packed=True,
        streaming=True,
        width=True,
        cost="n^2",
    ),
    paper="2010.03688",
)
class TopK(Core):
    """Selective hard attention: ``softmax`` over the ``keep`` largest valid scores of each row.

    ``S = K^-0.5 q k^T``; keys that may not be attended to are excluded first, then exactly
    ``min(keep, valid)`` keys stay in every row (ties are cut, never widened) and share the
    probability; all others get exactly zero. The selection is constant under differentiation.

    Scores still cost O(N M K): what shrinks is the softmax and, with ``path="gather"``, the sum of
    values. Both paths give the same result; rows are evaluated in slices, so memory grows with
    N and not with N M.

    Differs from the paper: no code was published; whether the authors renormalise the kept weights
    is our reading.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: AxFormer: Accuracy-driven Approximation of Transformers for Faster, Smaller and more
    Accurate NLP Models, 2020, arXiv 2010.03688.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        """Knobs of `TopK`.

        Attributes:
            keep: keys that a query attends to.
            path: "dense" multiplies all values by weights that are mostly zero, "gather" collects
                the chosen values; changes speed, not results.
        """

        keep: Count = 32
        path: Literal["dense", "gather"] = "dense"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        mask = ctx.mask
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None, :]
        if self.config.causal and q.shape[2] != k.shape[2]:
            raise CapabilityError(
                f"causal attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}"
            )
        return self._rows(q, k, v, mask, first=0)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, first: int) -> Tensor:
        """All queries, a slice at a time; query i stands at position first + i."""
        n, m = q.shape[2], k.shape[2]
        size = max(1, _ELEMENTS // max(q.shape[0] * q.shape[1] * m, 1))
        known = known_length(q) and known_length(k)
        if torch.compiler.is_exporting() or not known or size >= n:
            return self._attend(q, k, v, self._allowed(mask, 0, n, first, k))
        outputs = []
        for start in range(0, n, size):
            rows = q[:, :, start : start + size]
            allowed = self._allowed(mask, start, rows.shape[2], first, k)
            outputs.append(self._attend(rows, k, v, allowed))
        return torch.cat(outputs, dim=2)

    def _allowed(
        self, mask: Tensor | None, start: int, count: int, first: int, k: Tensor
    ) -> Tensor | None:
        """The mask of ``count`` rows from ``start`` on, None if everything is allowed."""
        if mask is not None and mask.shape[-2] != 1:
            mask = mask[..., start : start + count, :]
        if not self.config.causal:
            return mask
        rows = torch.arange(count, device=k.device)[:, None] + (first + start)
        past = rows >= torch.arange(k.shape[2], device=k.device)
        return past if mask is None else mask & past

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        best, index = scores.topk(min(self.config.keep, k.shape[2]), dim=-1)
        if allowed is not None:  # rows without a key: any finite scores, then weights of zero
            real = best > -torch.inf
            weights = best.masked_fill(~real, torch.finfo(best.dtype).min).softmax(dim=-1) * real
        else:
            weights = best.softmax(dim=-1)
        if self.config.path == "dense":
            return torch.zeros_like(scores).scatter(-1, index, weights.to(scores.dtype)) @ v
        batch, heads, n, keep = index.shape
        # one flat look-up: gathering from an expanded tensor would copy (B, H, N, M, V) backwards
        start = torch.arange(batch * heads, device=v.device).view(batch, heads, 1, 1) * v.shape[2]
        chosen = F.embedding(index + start, v.flatten(0, 2)).view(batch, heads, n, keep, -1)
        return (weights.unsqueeze(-2) @ chosen).squeeze(-2)

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        keys = n if m is None else m
        summed = keys if self.config.path == "dense" else min(self.config.keep, keys)
        return heads * head_dim * n * (keys + summed)

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
        past = state.k.shape[2]
        k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
        return self._rows(q, k, v, None, first=past), SoftmaxState(k, v)
