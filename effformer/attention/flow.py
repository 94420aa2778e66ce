"""Flow-Attention: softmax attention replaced by two competitions under flow conservation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from effformer.context import EMPTY, Context, Rope
from effformer.nn.precision import exactly, widened
from effformer.registry import Caps, core
from effformer.values import Count, NonNegative, Positive

from .base import Core, CoreConfig
from .scan import causal_product, causal_product_macs, running_sum, scan_slices
from .slices import Rows, over_heads, pieces, token_slices

__all__ = ["FLOW_PRESETS", "Flow", "FlowState", "FlowTerms"]


class FlowState(NamedTuple):
    """Sums over the past of a causal Flow-Attention; the size does not depend on the number of
    tokens.

    Attributes:
        tokens: (B, 1) number of tokens.
        k: (B, H, K) sum of keys.
        q: (B, H, K) sum of queries.
        ko: (B, H, K) sum of keys times outgoing flow.
        qi: (B, H, K) sum of queries times incoming flow.
        e: (B, H) sum of exp(conserved outgoing flow).
        kv: (B, H, K, V) sum of keys times competing values.
    """

    tokens: Tensor
    k: Tensor
    q: Tensor
    ko: Tensor
    qi: Tensor
    e: Tensor
    kv: Tensor


class FlowTerms(NamedTuple):
    """Flows of N sinks (queries) and M sources (keys), each (B, H, N, 1) or (B, H, M, 1).

    Attributes:
        incoming: I of every sink; the causal form's carries the number of tokens so far.
        outgoing: O of every source; likewise.
        conserved_in: I' of every sink.
        conserved_out: O' of every source, before the clamp.
    """

    incoming: Tensor
    outgoing: Tensor
    conserved_in: Tensor
    conserved_out: Tensor


@core.register(
    "flow",
    caps=Caps(
        causal="optional",
        cross=True,
        order_free=True,
        mask="key",
        rope=True,
        packed=True,
        streaming=True,
        width=True,
        cost="n",
    ),
    paper="2202.06258",
)
class Flow(Core):
    """Flow-Attention: linear cost, no locality assumption, competition instead of a softmax over
    pairs.

    With phi(x) = sigmoid(x) on queries and keys, N sinks (queries) and M sources (keys)::

        I_i = 1 / ((q_i + eps) . (sum_j k_j + eps))          incoming flow of sink i
        O_j = 1 / ((k_j + eps) . (sum_i q_i + eps))          outgoing flow of source j
        I'_i = (q_i + eps) . (sum_j k_j O_j + eps)           conserved incoming flow
        O'_j = (k_j + eps) . (sum_i q_i I_i + eps)           conserved outgoing flow, clamped
        c_j = M softmax_j(O'_j)                              competition among sources
        a_i = sigmoid(I'_i N / M)                            allocation to sinks
        out_i = a_i I_i q_i (sum_j k_j^T v_j c_j)

    The causal form replaces every sum by its prefix and N, M by the number of tokens so far; a
    token's competition weight is fixed when it appears, so decoding needs a state of constant size.

    Rotary positions turn features in the last line only, ``out_i = a_i I_i (R_i q_i) sum_j (R_j
    k_j)^T v_j c_j``: flows are capacities and stay positive, and what is conserved stays so.

    With a key mask, padded tokens carry no flow and N, M count valid tokens per sample; in
    self-attention the mask stands for the queries too, because sums over sinks enter every source.

    Differs from the paper: masks and rotary positions (not in the paper); prefix sums in chunks, so
    that the causal form needs memory linear in tokens; ``(q + eps) . s`` is evaluated as ``q . s +
    eps sum(s)``, which is the same number.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Flowformer: Linearizing Transformers with Conservation Flows, 2022, arXiv 2202.06258.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        """Knobs of `Flow`; `FLOW_PRESETS` lists the published settings.

        Attributes:
            kernel: phi, "sigmoid" or "relu" (``relu(x) + 1e-6``).
            clamp: bound of the conserved outgoing flow, None for no bound.
            eps: added to every component in the dot products.
            flow_eps: added once more to the denominators of I and O and to I' and O' (vision
                preset).
            chunk: tokens per chunk of the causal form; changes speed, not results.
        """

        kernel: Literal["sigmoid", "relu"] = "sigmoid"
        clamp: Positive | None = 1.0
        eps: Positive = 1e-6
        flow_eps: NonNegative = 0.0
        chunk: Count = 128

    rotates = "inside"
    competes = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        with exactly(q):
            return self._mixed(q, k, widened(v), ctx).to(v.dtype)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        mask = None if ctx.mask is None else ctx.mask[:, None, :, None].to(v.dtype)
        if self.config.causal:
            return self._scan(q, k, v, mask, ctx.rope, None)[0]
        own = ctx.memory is None

        def mix(q: Tensor, k: Tensor, v: Tensor, heads: slice) -> Tensor:
            rope = None if ctx.rope is None else ctx.rope.heads(heads)
            return self._parallel(q, k, v, mask, rope, self_attention=own)

        return over_heads(mix, q, k, v)

    def flows(self, q: Tensor, k: Tensor, ctx: Context = EMPTY) -> FlowTerms:
        """The flows that decide the mixing; q (B, H, N, K) and k (B, H, M, K) as in `forward`."""
        mask = None if ctx.mask is None else ctx.mask[:, None, :, None].to(widened(k).dtype)
        if self.config.causal:
            counted = _counted(self._phi(q), self._phi(k), mask, None)
            return self._running(*counted, mask, None)[0]
        q_mask = mask if ctx.memory is None else None
        return self._flows(self._features(q, q_mask), self._features(k, mask), q_mask, mask)

    def _phi(self, x: Tensor) -> Tensor:
        x = widened(x)
        x = x.sigmoid() if self.config.kernel == "sigmoid" else x.relu() + 1e-6
        return x.contiguous()  # heads cut from a fused projection would be copied by every product

    def _clamp(self, flow: Tensor) -> Tensor:
        bound = self.config.clamp
        return flow if bound is None else flow.clamp(-bound, bound)

    def _features(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Phi of x, zero where the mask is, in slices whose heads stay in cache each."""
        slices = token_slices(x.shape[2], x.shape[0] * x.shape[3], device=x.device)
        return [
            _masked(self._phi(some), None if mask is None else mask[:, :, rows])
            for rows, some in zip(slices, pieces(x, slices), strict=True)
        ]

    def _against(self, xs: list[Tensor], total: Tensor) -> Tensor:
        """``(x + eps) . (total + eps)`` for slices x (B, H, n, K) and total (B, H, 1, K), joined:
        (B, H, N, 1).
        """
        total = total + self.config.eps
        dots = torch.cat([x @ total.mT for x in xs], dim=2)
        return dots + self.config.eps * total.sum(dim=-1, keepdim=True)

    def _parallel(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        rope: Rope | None,
        *,
        self_attention: bool,
    ) -> Tensor:
        sinks, sources = q.shape[2], k.shape[2]
        q_mask = mask if self_attention else None
        qs, ks = self._features(q, q_mask), self._features(k, mask)
        incoming, _, conserved_in, conserved_out = self._flows(qs, ks, q_mask, mask)
        conserved_out = self._clamp(conserved_out)
        if mask is None:
            allocation = torch.sigmoid(conserved_in * sinks / sources)
            competition = conserved_out.softmax(dim=2) * sources
        else:
            valid = mask.sum(dim=2, keepdim=True).clamp(min=1)
            queries = valid if self_attention else sinks
            allocation = torch.sigmoid(conserved_in * queries / valid)
            lowest = torch.finfo(conserved_out.dtype).min
            competition = conserved_out.masked_fill(mask == 0, lowest).softmax(dim=2) * mask * valid
        if rope is not None:
            qs = [t.query(x) for t, x in zip(_tables(qs, rope), qs, strict=True)]
            ks = [t.key(x) for t, x in zip(_tables(ks, rope), ks, strict=True)]
        parts = zip(ks, *(_like(ks, x) for x in (v, competition)), strict=True)
        values = reduce(torch.add, [x.mT @ (some * share) for x, some, share in parts])
        outputs = Rows(sinks)
        for x, share in zip(qs, _like(qs, incoming * allocation), strict=True):
            outputs.append((x @ values) * share)
        return outputs.joined()

    def _flows(
        self, qs: list[Tensor], ks: list[Tensor], q_mask: Tensor | None, mask: Tensor | None
    ) -> FlowTerms:
        extra = self.config.flow_eps
        incoming = _masked(1 / (self._against(qs, _total(ks)) + extra), q_mask)
        outgoing = _masked(1 / (self._against(ks, _total(qs)) + extra), mask)
        sum_ko, sum_qi = _total(_weighted(ks, outgoing)), _total(_weighted(qs, incoming))
        conserved_in = self._against(qs, sum_ko) + extra
        return FlowTerms(incoming, outgoing, conserved_in, self._against(ks, sum_qi) + extra)

    def _scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        rope: Rope | None,
        state: FlowState | None,
    ) -> tuple[Tensor, FlowState]:
        """The causal form on the next tokens, from the sums of the past (None: none)."""
        outputs, slices = Rows(q.shape[2]), scan_slices(q, chunk=self.config.chunk)
        parts = (pieces(x, slices) for x in (q, k, v))
        for rows, some_q, some_k, some_v in zip(slices, *parts, strict=True):
            real = None if mask is None else mask[:, :, rows]
            here = None if rope is None else rope.tokens(rows)
            phi = self._phi(some_q), self._phi(some_k)
            out, state = self._piece(*phi, some_v, real, here, state)
            outputs.append(out)
        assert state is not None
        return outputs.joined(), state

    def _piece(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        rope: Rope | None,
        state: FlowState | None,
    ) -> tuple[Tensor, FlowState]:
        """The causal form on a few tokens that stay in cache."""
        q, k, count = _counted(q, k, mask, state)
        n = count.clamp(min=1)
        (incoming, _, conserved_in, conserved_out), sums = self._running(q, k, count, mask, state)
        conserved_out = self._clamp(conserved_out)
        allocation = conserved_in.sigmoid()
        weight = _masked(conserved_out.exp(), mask)
        sum_e = running_sum(weight, None if state is None else state.e.unsqueeze(-1))
        competition = n * weight / sum_e.clamp(min=torch.finfo(sum_e.dtype).tiny)
        start = None if state is None else state.kv
        if rope is not None:
            q, k = rope.query(q), rope.key(k)
        out, kv = causal_product(q, k, v * competition, start, chunk=self.config.chunk)
        sum_k, sum_q, sum_ko, sum_qi = (total[:, :, -1] for total in sums)
        last = FlowState(count[:, 0, -1], sum_k, sum_q, sum_ko, sum_qi, sum_e[:, :, -1, 0], kv)
        return out * (allocation * incoming / n), last

    def _running(
        self, q: Tensor, k: Tensor, count: Tensor, mask: Tensor | None, state: FlowState | None
    ) -> tuple[FlowTerms, tuple[Tensor, ...]]:
        """The causal flows, and the prefix sums of k, q, k O and q I."""
        eps, extra = self.config.eps, self.config.flow_eps
        # before the first valid token every sum is zero and nothing valid is computed
        n = count.clamp(min=1)

        def dot(x: Tensor, total: Tensor) -> Tensor:
            return ((x + eps) * (total + eps)).sum(dim=-1, keepdim=True)

        sum_k = running_sum(k, None if state is None else state.k)
        sum_q = running_sum(q, None if state is None else state.q)
        incoming = _masked(n / (dot(q, sum_k) + extra), mask)
        outgoing = _masked(n / (dot(k, sum_q) + extra), mask)
        sum_ko = running_sum(k * outgoing, None if state is None else state.ko)
        sum_qi = running_sum(q * incoming, None if state is None else state.qi)
        conserved_in = dot(q, sum_ko) / n + extra
        conserved_out = dot(k, sum_qi) / n + extra
        flows = FlowTerms(incoming, outgoing, conserved_in, conserved_out)
        return flows, (sum_k, sum_q, sum_ko, sum_qi)

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        """Two products and four dot products per token; weighted sums count as elementwise work."""
        if self.config.causal:
            return causal_product_macs(n, self.config.chunk, heads=heads, head_dim=head_dim)
        keys = n if m is None else m
        return heads * (n + keys) * (head_dim**2 + 2 * head_dim)

    def init_state(self, batch: int, *, heads: int, head_dim: int, like: Tensor) -> FlowState:
        """Zero sums, in float32 at least."""
        like = widened(like)
        width = like.new_zeros(batch, heads, head_dim)
        square = like.new_zeros(batch, heads, head_dim, head_dim)
        return FlowState(
            like.new_zeros(batch, 1),
            width,
            width,
            width,
            width,
            like.new_zeros(batch, heads),
            square,
        )

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: FlowState, ctx: Context = EMPTY
    ) -> tuple[Tensor, FlowState]:
        """Feed the next tokens (B, H, n, K)."""
        with exactly(q):
            out, state = self._scan(q, k, widened(v), None, ctx.rope, state)
        return out.to(v.dtype), state


FLOW_PRESETS: dict[str, Flow.Config] = {
    "flowformer": Flow.Config(),
    "gpt": Flow.Config(causal=True),
    "vision": Flow.Config(flow_eps=1e-6),
    "time-series": Flow.Config(clamp=None),
    "long-range-arena": Flow.Config(kernel="relu", clamp=None),
    "language-model": Flow.Config(causal=True, clamp=5.0),
    "reinforcement-learning": Flow.Config(causal=True, clamp=10.0),
}
"""Published settings of `Flow` by task."""


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _slices(xs: list[Tensor]) -> list[slice]:
    """The tokens that pieces xs stand for; a single piece stands for all."""
    if len(xs) == 1:
        return [slice(None)]
    starts = accumulate((x.shape[2] for x in xs), initial=0)
    return [slice(start, start + x.shape[2]) for start, x in zip(starts, xs, strict=False)]


def _like(xs: list[Tensor], y: Tensor) -> tuple[Tensor, ...]:
    """The tokens of y in the same slices as xs."""
    return pieces(y, _slices(xs))


def _tables(xs: list[Tensor], rope: Rope) -> list[Rope]:
    """Rotary tables in the same slices as xs."""
    return [rope.tokens(rows) for rows in _slices(xs)]


def _total(xs: Iterable[Tensor]) -> Tensor:
    """Sum over the tokens of all slices, (B, H, 1, K)."""
    return reduce(torch.add, [x.sum(dim=2, keepdim=True) for x in xs])


def _weighted(xs: list[Tensor], weights: Tensor) -> Iterator[Tensor]:
    """Slices times weights (B, H, N, 1) of their tokens, one by one."""
    for x, some in zip(xs, _like(xs, weights), strict=True):
        yield x * some


def _counted(
    q: Tensor, k: Tensor, mask: Tensor | None, state: FlowState | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked queries and keys, and the number of valid tokens so far (B or 1, 1, N, 1)."""
    if mask is None:
        count = torch.ones_like(q[:, :1, :, :1]).cumsum(dim=2)
    else:
        q, k, count = q * mask, k * mask, mask.cumsum(dim=2)
    if state is not None:
        count = count + state.tokens[:, None, :, None]
    return q, k, count
