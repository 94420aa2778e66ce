"""Efficient attention: keys are normalised over tokens, queries over channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from effformer.context import EMPTY, Context, Rope
from effformer.registry import Caps, core

from .base import Core, CoreConfig
from .slices import Rows, known_length, pieces, slices_of

__all__ = ["Efficient"]

_LOG2_E = math.log2(math.e)


@core.register(
    "efficient",
    caps=Caps(cross=True, order_free=True, mask="key", rope=True, packed=True, width=True),
    paper="1812.01243",
)
class Efficient(Core):
    """Efficient attention: ``softmax_channels(q) (softmax_tokens(k)^T v)``.

    Every key channel is one global map over the tokens; queries mix the K summaries. It is also
    called "linear attention" in several packages, and is Performer's form without projection.
    Rotary positions turn both behind their softmax; rows of the weights then no longer sum to one.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Efficient Attention: Attention with Linear Complexities, 2018, arXiv 1812.01243.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        """Knobs of `Efficient`."""

        def check(self) -> None:
            if self.causal:
                raise ValueError("efficient: has no causal form; use linear, performer or flow")

    rotates = "inside"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        if (
            known_length(k) and not k.shape[2]
        ):  # no key has the largest value; all hidden give as much
            return q.new_zeros(*q.shape[:3], v.shape[3])
        if ctx.rope is None:
            summaries = self._summaries(k, v, ctx.mask).to(q.dtype)
        else:
            summaries = self._turned(k, v, ctx.mask, ctx.rope).to(q.dtype)
        slices = slices_of(q)
        outputs = Rows(q.shape[2])
        for rows, some in zip(slices, pieces(q, slices), strict=True):
            weights = some.softmax(dim=-1)
            if ctx.rope is not None:
                weights = ctx.rope.tokens(rows).query(weights)
            outputs.append(weights @ summaries)
        return outputs.joined()

    def _summaries(self, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """``softmax_tokens(k)^T v``, (B, H, K, V), a few tokens at a time.

        The sums are scaled by the largest key so far. The exponentials have base 2, which is several
        times faster.
        """
        dtype = torch.promote_types(k.dtype, torch.float32)
        lowest = torch.finfo(dtype).min / 4  # differences stay finite
        top = torch.full_like(k[:, :, :1], lowest, dtype=dtype)
        total, sums = torch.zeros_like(top), None
        slices = slices_of(k)
        for rows, keys, values in zip(slices, pieces(k, slices), pieces(v, slices), strict=True):
            keys, values = keys.to(dtype) * _LOG2_E, values.to(dtype)
            if mask is not None:
                real = mask[:, None, rows, None]
                keys, values = keys.masked_fill(~real, lowest), values * real
            largest = torch.maximum(top, keys.amax(dim=2, keepdim=True)).detach()
            weights, fade = (keys - largest).exp2(), (top - largest).exp2()
            product = weights.mT @ values
            sums = product if sums is None else sums * fade.mT + product
            total, top = total * fade + weights.sum(dim=2, keepdim=True), largest
        assert sums is not None
        return sums / total.mT

    def _turned(self, k: Tensor, v: Tensor, mask: Tensor | None, rope: Rope) -> Tensor:
        """The same with turned weights. Channels of a pair mix, so that each must have its sum over
        the tokens before.
        """
        dtype = torch.promote_types(k.dtype, torch.float32)
        k, v = k.to(dtype) * _LOG2_E, v.to(dtype)
        if mask is not None:
            real = mask[:, None, :, None]
            k, v = k.masked_fill(~real, torch.finfo(dtype).min / 4), v * real
        top, slices = k.amax(dim=2, keepdim=True).detach(), slices_of(k)
        weights = [(keys - top).exp2() for keys in pieces(k, slices)]
        share = 1 / reduce(torch.add, [some.sum(dim=2, keepdim=True) for some in weights])
        products = [
            rope.tokens(rows).key(some * share).mT @ values
            for rows, some, values in zip(slices, weights, pieces(v, slices), strict=True)
        ]
        return reduce(torch.add, products)

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        return heads * (n + (n if m is None else m)) * head_dim**2
