"""Reformer: tokens attend within buckets of a locality-sensitive hash."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.context import EMPTY, Context, Rope, check_context
from effformer.nn.precision import exactly, widened
from effformer.registry import Caps, attention
from effformer.site import Site
from effformer.values import Count, Even, Seed

from .base import Mixer
from .slices import chunk_count, known_length, over_sequences, padded, token_slices

__all__ = ["Reformer"]

_CAPS = Caps(causal="optional", mask="key", rope=True, packed=True, cost="n log n")


@attention.register("reformer", caps=_CAPS, paper="2001.04451")
class Reformer(Mixer):
    """LSH attention with shared queries and keys: ``softmax_j(q_i . q_j / |q_j|) v_j`` over near j.

    In each round a random rotation R hashes a token into ``argmax [q R; -q R]``; tokens are sorted
    by (bucket, position) and cut into chunks; a chunk attends to itself and to the chunk before it.
    A token attends to itself only if it has no other target. Rounds are weighted by their
    normalisers (log-sum-exp of scores). No gradient flows through hashing and sorting. With at most
    ``chunk`` tokens all rounds see everything: plain attention with shared queries and keys.

    Rotations are the buffer ``rotations`` (H, K, rounds, buckets / 2), drawn from ``seed`` and the
    layer's index and saved with the weights. Masked tokens have a bucket of their own, behind all
    others, and any number of tokens is padded to whole chunks with such tokens.

    Rotary positions turn queries and keys of the scores, ``R_i q_i . R_j q_j / |q_j|``, and not what
    is hashed: buckets go by content.

    The causal form attends to the ``chunk`` latest tokens of the same bucket. Where chunks are cut
    depends on later tokens, so that masking later keys alone would let the future through.

    Differs from the paper: chunks see no chunk of another round, so that padding changes nothing;
    the causal form, as above. ``compat`` reproduces the published code.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        ValueError: the width is not divisible by the heads.

    Reference: Reformer: The Efficient Transformer, 2020, arXiv 2001.04451.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `Reformer`.

        Attributes:
            chunk: tokens per chunk.
            rounds: number of hashes.
            buckets: number of buckets of a hash, even; None means the largest power of two that is
                at most 2 tokens / chunk where the model fixes its tokens, else 32.
            causal: output i depends on tokens <= i only.
            head_dim: width of a head; None means dim / heads.
            across: tokens of one chunk attend across the borders of buckets.
            once: keys that a query meets in several rounds count once.
            compat: "none", or the code whose numbers are wanted, "transformers" or
                "reformer-pytorch": chunks wrap around over all rounds, ``causal`` masks later keys
                but cuts chunks by them (it leaks), and the latter divides scores by K^0.5 again.
            proj_bias: the output projection has a bias.
            seed: seed of the rotations.
        """

        chunk: Count = 64
        rounds: Count = 4
        buckets: Even | None = None
        causal: bool = False
        head_dim: Count | None = None
        across: bool = True
        once: bool = False
        compat: Literal["none", "transformers", "reformer-pytorch"] = "none"
        proj_bias: bool = True
        seed: Seed = 0

        def check(self) -> None:
            if self.causal and self.once and self.compat == "none":
                raise ValueError("reformer: once is not offered for the causal form")

        def head_width(self, dim: int, heads: int) -> int:
            """Width K of a head."""
            return self.head_dim or dim // heads

    rotations: Tensor

    def __init__(self, config: Reformer.Config, site: Site) -> None:
        super().__init__(config, site)
        if config.head_dim is None and site.dim % site.heads:
            raise ValueError(
                f"{site.path or 'reformer'}: width {site.dim} is not divisible by {site.heads} "
                "heads; change heads or give head_dim"
            )
        self.strict = config.causal and config.compat == "none"
        self.heads, self.head_dim = site.heads, config.head_width(site.dim, site.heads)
        inner = self.heads * self.head_dim
        self.qk = nn.Linear(site.dim, inner, bias=False)
        self.v = nn.Linear(site.dim, inner, bias=False)
        self.proj = nn.Linear(inner, site.out_dim or site.dim, bias=config.proj_bias)
        self.drop = nn.Dropout(site.dropout)
        self.buckets = config.buckets or _bucket_count(site.length, config.chunk)
        shape = (self.heads, self.head_dim, config.rounds, self.buckets // 2)
        self.register_buffer("rotations", torch.empty(shape))
        self.redraw(torch.Generator().manual_seed(config.seed + site.layer))

    def redraw(self, generator: torch.Generator) -> None:
        """Draw new rotations in place."""
        drawn = torch.randn(self.rotations.shape, generator=generator, device="cpu")
        self.rotations.copy_(drawn)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        where = self.site.path or "reformer"
        check_context(ctx, _CAPS, "attention", where, x)
        if ctx.packing is None:
            return self.drop(self.proj(self._mix(x, ctx, ctx.mask, ctx.rope)))
        if ctx.mask is not None or ctx.tap is not None:
            raise CapabilityError(f"{where}: packing goes with neither mask nor tap; unpack first")
        mixed = over_sequences(lambda one, rope: self._mix(one, ctx, None, rope), x, ctx)
        return self.drop(self.proj(mixed))

    def _mix(self, x: Tensor, ctx: Context, mask: Tensor | None, rope: Rope | None) -> Tensor:
        """Everything between input and output projection."""
        heads = (self.heads, self.head_dim)
        q, v = (p(x).unflatten(-1, heads).transpose(1, 2) for p in (self.qk, self.v))
        if ctx.tap is not None:
            q, v = (ctx.tap(f"{self.site.path}.{name}", y) for name, y in (("q", q), ("v", v)))
        return self.attend(q, v, mask, rope).transpose(1, 2).flatten(2)

    def attend(
        self, q: Tensor, v: Tensor, mask: Tensor | None = None, rope: Rope | None = None
    ) -> Tensor:
        """LSH attention of q (B, H, N, K), which are the keys, too, and v (B, H, N, V); scores are in
        float32 at least.
        """
        with exactly(q):
            return self._attend(widened(q), widened(v), mask, rope).to(v.dtype)

    def _attend(self, q: Tensor, v: Tensor, mask: Tensor | None, rope: Rope | None) -> Tensor:
        n, chunk = q.shape[2], self.config.chunk
        turned = q if rope is None else rope.query(q)
        known = known_length(q)
        if torch.compiler.is_exporting() and not known and self.config.compat != "none":
            raise CapabilityError(
                f"{self.site.path or 'reformer'}: compat={self.config.compat!r} rounds as the published "
                "code does at every number of tokens, which no graph for all of them has; fix it, or "
                "take compat='none'"
            )
        if known and n <= chunk and not self.strict:
            return self._plain(turned, v, mask)
        # where chunks wrap around, the first would see one more than is needed
        chunks = chunk_count(q, chunk) if self.config.compat == "none" else (n + chunk - 1) // chunk
        pad = chunks * chunk - n
        if not known or pad:
            mask = q.new_ones(q.shape[0], n, dtype=torch.bool) if mask is None else mask
            q, turned, v = (padded(x, pad) for x in (q, turned, v))
            mask = F.pad(mask, (0, pad))
        hashes = self.hash(q, mask)
        rounds, total = hashes.shape[2:]
        if self.config.compat != "none":  # all rounds are one list
            hashes = hashes.flatten(2)[:, :, None]
        place = torch.arange(hashes.shape[-1], device=q.device)
        order = (hashes * hashes.shape[-1] + place).argsort(dim=-1)
        if not (known or self.strict or self.config.across):  # few tokens all meet, as in `_plain`
            hashes = hashes * (place[:1] + n > chunk)
        out, normaliser = self._chunks(turned, v, hashes, order, mask)
        back = torch.zeros_like(order).scatter(3, order, place.expand_as(order))
        lists = torch.arange(back.shape[2], device=q.device)[:, None] * back.shape[3]
        out = _rows(out.flatten(2, 3), (back + lists).flatten(2)).unflatten(2, (rounds, total))
        normaliser = normaliser.gather(3, back).flatten(2).unflatten(2, (rounds, total))
        if self.config.compat == "none":
            weights = normaliser.softmax(dim=2)
        else:  # with tokens that see only themselves, at -1e5, this does not sum to one in float32
            weights = (normaliser - normaliser.logsumexp(dim=2, keepdim=True)).exp()
        return (out * weights[..., None]).sum(dim=2)[:, :, :n]

    def hash(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        """Buckets (B, H, rounds, N), counted on from round to round."""
        rotated = torch.einsum("bhnk,hkrf->bhrnf", q.detach(), self.rotations.to(q.dtype))
        buckets, count = torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1), self.buckets
        if mask is not None:
            buckets, count = torch.where(mask[:, None, None], buckets, count), count + 1
        first = torch.arange(self.config.rounds, device=q.device) * count
        return buckets + first[:, None]

    def _keys(self, q: Tensor) -> Tensor:
        """Queries of unit length; the epsilon is that of the published code."""
        keys = q * (q.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
        power = -1.0 if self.config.compat == "reformer-pytorch" else -0.5
        return keys * q.shape[-1] ** power

    def _plain(self, q: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        scores = q @ self._keys(q).mT
        if mask is not None:
            scores = _hidden(scores, ~mask[:, None, None])
        if self.config.causal:
            lower = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
            scores = _hidden(scores, ~lower)
        own = torch.eye(n, dtype=torch.bool, device=q.device)
        return self._last(scores, own).softmax(dim=-1) @ v

    def _last(self, scores: Tensor, own: Tensor) -> Tensor:
        """Scores with which tokens see themselves only if they see nothing else."""
        return scores.masked_fill_(own, -5e4 if self.config.compat == "reformer-pytorch" else -1e5)

    def _chunks(
        self, q: Tensor, v: Tensor, hashes: Tensor, order: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attend in sorted order.

        Returns:
            Outputs (B, H, lists, T, V) and log-normalisers (B, H, lists, T).
        """
        chunk, tokens = self.config.chunk, torch.arange(q.shape[2], device=q.device)
        # all rounds may be one list; an index, since ONNX takes no remainder of an open length
        place = tokens.repeat(self.config.rounds)[order]

        def sort(x: Tensor) -> Tensor:
            return _rows(x, place.flatten(2)).unflatten(2, (*place.shape[2:3], -1, chunk))

        queries, values = sort(q), self._with_previous(sort(v), 0)
        keys = self._with_previous(self._keys(queries), 0)
        mine = place.unflatten(3, (-1, chunk))
        theirs = self._with_previous(mine, -1)
        real = buckets = None
        if mask is not None:
            real = sort(mask[:, None, :, None].expand(-1, q.shape[1], -1, -1))[..., 0]
            real = self._with_previous(real, 0)
        if self.strict or not self.config.across:
            buckets = hashes.gather(3, order).unflatten(3, (-1, chunk))
            buckets = (buckets, self._with_previous(buckets, -1))
        met = self._meetings(order, hashes, mine, theirs) if self.config.once else None
        outputs, normalisers = [], []
        for some in token_slices(
            mine.shape[3], 2 * chunk * mine[:, :, :, 0].numel(), device=q.device, least=1
        ):
            allowed = self._allowed(mine, theirs, real, buckets, some)
            scores = queries[:, :, :, some] @ keys[:, :, :, some].mT
            scores = scores if allowed is None else _hidden(scores, ~allowed)
            own = mine[:, :, :, some, :, None] == theirs[:, :, :, some, None]
            scores = self._last(scores, own)
            if met is not None:
                scores = scores - (met[:, :, :, some] + 1e-9).log()
            normalisers.append(scores.logsumexp(dim=-1, keepdim=True))
            outputs.append((scores - normalisers[-1]).exp_() @ values[:, :, :, some])
        return torch.cat(outputs, dim=3).flatten(3, 4), torch.cat(normalisers, dim=3).flatten(3)

    def _allowed(
        self,
        mine: Tensor,
        theirs: Tensor,
        real: Tensor | None,
        buckets: tuple[Tensor, Tensor] | None,
        some: slice,
    ) -> Tensor | None:
        """Which keys the queries of some chunks may see, None for all that stand there."""
        ours, others = mine[:, :, :, some], theirs[:, :, :, some]
        allowed = None
        if self.config.compat == "none":  # before the first chunk there is nothing
            allowed = (others >= 0)[..., None, :]
        if real is not None:
            there = real[:, :, :, some, None]
            allowed = there if allowed is None else allowed & there
        if buckets is not None:
            near = buckets[0][:, :, :, some, :, None] == buckets[1][:, :, :, some, None]
            allowed = near if allowed is None else allowed & near
        if self.strict:
            chunk = self.config.chunk
            slots = torch.arange(2 * chunk, device=mine.device)
            ahead = slots - slots[:chunk, None]  # of the earliest key that every query reaches
            latest = (ahead >= 0) & (ahead <= chunk)
            allowed = latest if allowed is None else allowed & latest
        elif self.config.causal:
            past = ours[..., None] >= others[..., None, :]
            allowed = past if allowed is None else allowed & past
        return allowed

    def _with_previous(self, x: Tensor, empty: int) -> Tensor:
        """Chunks behind the ones before them: (B, H, lists, C, c, ...) -> (..., C, 2 c, ...)."""
        last = x[:, :, :, -1:]
        first = torch.full_like(last, empty) if self.config.compat == "none" else last
        # cut behind: of two chunks, all but the last are one, which tracers take for a constant
        return torch.cat([torch.cat([first, x], dim=3)[:, :, :, :-1], x], dim=4)

    def _meetings(self, order: Tensor, hashes: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
        """How often, over all rounds, each pair of tokens meets in a chunk and its predecessor."""
        shape = (self.config.rounds, -1)
        chunks = (order.argsort(dim=-1) // self.config.chunk).flatten(2).unflatten(2, shape)
        buckets = hashes.flatten(2).unflatten(2, shape)
        total = order.shape[-1] // self.config.chunk
        count = torch.zeros((), dtype=self.rotations.dtype, device=order.device)
        for i in range(self.config.rounds):
            ours, others = (
                tuple(
                    table[:, :, i].gather(2, at.clamp(min=0).flatten(2)).view_as(at)
                    for table in (chunks, buckets)
                )
                for at in (mine, theirs)
            )
            behind = others[0] + 1
            if self.config.compat != "none":
                behind = behind.where(behind < total, 0)
            met = (ours[0][..., None] == others[0][..., None, :]).to(count.dtype)
            met = met + (ours[0][..., None] == behind[..., None, :])
            if not self.config.across:
                met = met * (ours[1][..., None] == others[1][..., None, :])
            count = count + met
        return count

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        inner = self.heads * self.head_dim
        total = n * inner * (2 * self.site.dim + (self.site.out_dim or self.site.dim))
        chunk, rounds = self.config.chunk, self.config.rounds
        if n <= chunk and not self.strict:
            return total + 2 * n * n * inner
        rows = rounds * -(-n // chunk) * chunk
        return total + rows * inner * (self.buckets // 2 + 4 * chunk)


def _hidden(scores: Tensor, hidden: Tensor) -> Tensor:
    """Scores, written over where keys are hidden."""
    # a literal: `torch.compile(dynamic=True)` makes inputs of named floats, and captures all anew when
    # it finds that an operator takes none
    return scores.masked_fill_(hidden, -1e9)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, H, M, K) by index (B, H, L): (B, H, L, K), whole rows at a time."""
    batch, heads, count = x.shape[:3]
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * count
    return F.embedding(index + first, x.flatten(0, 2))


def _bucket_count(tokens: int | None, chunk: int) -> int:
    if tokens is None:
        return 32
    return 2 ** max(1, int(math.log2(max(2 * tokens / chunk, 2))))
