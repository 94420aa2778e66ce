"""Linear attention with a positive feature map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer.context import EMPTY, Context, Rope
from effformer.nn.precision import exactly, widened
from effformer.registry import Caps, core
from effformer.values import Count, Positive

from .base import Core, CoreConfig
from .gated_onnx import linear_scan_onnx
from .scan import (
    causal_product,
    causal_product_macs,
    running_sum,
    scan_slices,
    takes_scan_node,
)
from .slices import Rows, pieces, slices_of

__all__ = ["Linear", "LinearState", "Sana"]


class LinearState(NamedTuple):
    """``sum phi(k)`` (B, H, K) and ``sum phi(k)^T v`` (B, H, K, V) of the past."""

    k: Tensor
    kv: Tensor


_CAPS = Caps(
    causal="optional",
    cross=True,
    order_free=True,
    mask="key",
    rope=True,
    packed=True,
    streaming=True,
    width=True,
)


@core.register("linear", caps=_CAPS, paper="2006.16236")
class Linear(Core):
    """Linear attention: ``phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j) + eps)``, phi
    = elu + 1.

    Costs O(N K V) instead of O(N^2 K). The causal form replaces the sums by prefix sums. Features
    and sums are in float32 at least.

    Rotary positions turn features, in the numerator only: ``(R_i phi(q_i)) sum_j (R_j phi(k_j))^T
    v_j``. The normaliser stays positive; the weights of a row no longer sum to one.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, 2020,
    arXiv 2006.16236; RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv
    2104.09864 (equation 19).
    """

    rotates = "inside"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        """Knobs of `Linear`.

        Attributes:
            eps: added to the normaliser.
            chunk: tokens per chunk of the causal form; changes speed, not results.
        """

        eps: Positive = 1e-6
        chunk: Count = 128

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        with exactly(q):
            return self._mixed(widened(q), widened(k), widened(v), ctx).to(v.dtype)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        mask = None if ctx.mask is None else ctx.mask[:, None, :, None].to(v.dtype)
        if self.config.causal:
            return self._scan(q, k, v, mask, ctx.rope, None)[0]
        kv, total = self._sums(k, v, mask, ctx.rope)
        outputs, slices = Rows(q.shape[2]), slices_of(q)
        for rows, some in zip(slices, pieces(q, slices), strict=True):
            phi = self.phi(some)
            turned = phi if ctx.rope is None else ctx.rope.tokens(rows).query(phi)
            outputs.append(turned @ kv / self.guarded(phi @ total))
        return outputs.joined()

    def _sums(
        self, k: Tensor, v: Tensor, mask: Tensor | None, rope: Rope | None
    ) -> tuple[Tensor, Tensor]:
        """``sum phi(k)^T v`` (B, H, K, V) and ``sum phi(k)^T`` (B, H, K, 1) over all tokens."""
        products, totals = [], []
        slices = slices_of(k)
        for rows, keys, values in zip(slices, pieces(k, slices), pieces(v, slices), strict=True):
            phi = self._masked_phi(keys, mask, rows)
            turned = phi if rope is None else rope.tokens(rows).key(phi)
            products.append(turned.mT @ values)
            totals.append(phi.sum(dim=2).unsqueeze(-1))
        return reduce(torch.add, products), reduce(torch.add, totals)

    def _masked_phi(self, k: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
        phi = self.phi(k)
        return phi if mask is None else phi * mask[:, :, rows]

    @staticmethod
    def phi(x: Tensor) -> Tensor:
        """Elu + 1, contiguous: heads cut from a fused projection would be copied by every
        product.
        """
        return F.elu(x.contiguous()) + 1

    def guarded(self, normaliser: Tensor) -> Tensor:
        """The normaliser, never 0."""
        return normaliser + self.config.eps

    def _scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        rope: Rope | None,
        state: LinearState | None,
    ) -> tuple[Tensor, LinearState]:
        """The causal form on the next tokens, from the sums of the past (None: none)."""
        if rope is None and takes_scan_node():
            return self._one_node(self.phi(q), self._masked_phi(k, mask, slice(None)), v, state)
        outputs, slices = Rows(q.shape[2]), scan_slices(q, chunk=self.config.chunk)
        parts = (pieces(x, slices) for x in (q, k, v))
        for rows, some_q, some_k, some_v in zip(slices, *parts, strict=True):
            phi_q, phi_k = self.phi(some_q), self._masked_phi(some_k, mask, rows)
            past, carried = (None, None) if state is None else state
            sums = running_sum(phi_k, past)
            normaliser = self.guarded((phi_q * sums).sum(dim=-1, keepdim=True))
            if rope is not None:
                here = rope.tokens(rows)
                phi_q, phi_k = here.query(phi_q), here.key(phi_k)
            out, kv = causal_product(phi_q, phi_k, some_v, carried, chunk=self.config.chunk)
            outputs.append(out / normaliser)
            state = LinearState(sums[:, :, -1], kv)
        assert state is not None
        return outputs.joined(), state

    def _one_node(
        self, q: Tensor, k: Tensor, v: Tensor, state: LinearState | None
    ) -> tuple[Tensor, LinearState]:
        """The causal form on features, numerator and normaliser from one node of the graph."""
        past = None if state is None else torch.cat([state.kv, state.k.unsqueeze(-1)], dim=-1)
        out, normaliser, last = linear_scan_onnx(q, k, v, past)
        return out / self.guarded(normaliser), LinearState(last[..., -1], last[..., :-1])

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        if self.config.causal:
            return causal_product_macs(n, self.config.chunk, heads=heads, head_dim=head_dim)
        keys = n if m is None else m
        return heads * head_dim * ((n + keys) * head_dim + n)

    def init_state(self, batch: int, *, heads: int, head_dim: int, like: Tensor) -> LinearState:
        """Zero sums, in float32 at least."""
        sums = widened(like.new_zeros(batch, heads, head_dim))
        return LinearState(sums, sums.new_zeros(batch, heads, head_dim, head_dim))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: LinearState, ctx: Context = EMPTY
    ) -> tuple[Tensor, LinearState]:
        """Feed the next tokens; the state has a fixed size."""
        with exactly(q):
            wide = widened(q), widened(k), widened(v)
            out, state = self._scan(*wide, None, ctx.rope, state)
        return out.to(v.dtype), state


@core.register("sana", caps=_CAPS, paper="2410.10629")
class Sana(Linear):
    """ReLU linear attention: ``relu(q_i) sum_j relu(k_j)^T v_j / (relu(q_i) . sum_j relu(k_j) +
    eps)``.

    A query whose features are all zero gets zeros. There is no scale and no position of its own: in
    SANA the convolution of the FFN (``ffn="glumbconv"``) supplies it, in SANA-Video rotary tables.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers,
    2024, arXiv 2410.10629; SANA-Video: Efficient Video Generation with Block Linear Diffusion
    Transformer, 2025, arXiv 2509.24695 (rotary positions).
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Linear.Config):
        """Knobs of `Sana`; see `Linear.Config`."""

        eps: Positive = 1e-15

    @staticmethod
    def phi(x: Tensor) -> Tensor:
        """Relu, contiguous."""
        return F.relu(x).contiguous()

    def guarded(self, normaliser: Tensor) -> Tensor:
        """The normaliser, at least eps: any sum above 1e-8 swallows an added 1e-15, and the ONNX
        optimizer takes that addition for one of zero.
        """
        return normaliser.clamp(min=self.config.eps)
