"""Nystrom attention: softmax attention approximated through a few landmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.context import EMPTY, Context
from effformer.nn.cut import put, twin
from effformer.registry import Caps, core
from effformer.site import Site
from effformer.values import Count, Odd

from .backends import attend, fused
from .base import Core, CoreConfig
from .slices import Rows, capturing, known_length, pieces

__all__ = ["Nystrom", "iterative_pinv"]

_BLOCK = 64


@core.register(
    "nystrom",
    caps=Caps(mask="key", rope=True, packed=True, width=True, cost="n"),
    paper="2102.03902",
)
class Nystrom(Core):
    """Nystrom attention: ``softmax(q l_k^T) A^+ (softmax(l_q k^T) v) + conv(v)``, ``A = softmax(l_q
    l_k^T)``.

    Scores carry the factor K^-0.5. The landmarks ``l_q, l_k`` are means over ``landmarks``
    consecutive groups of tokens whose sizes differ by one at most; ``A^+`` is `iterative_pinv`,
    which after a few steps is no exact inverse. ``conv`` is one depth-wise filter per head along
    the tokens. With at most as many tokens as landmarks the result is exact softmax attention.
    Rotary positions turn queries and keys before the means; a mean over tokens far apart loses the
    fast pairs.

    With a key mask the groups divide the valid tokens of a sample, all three kernels are masked
    and padding changes nothing.

    Differs from the paper: the published implementations scale ``A^+`` by a maximum over the whole
    batch, so that samples see each other, and treat masks and lengths that do not divide in their
    own ways; ``compat`` reproduces them.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention, 2021,
    arXiv 2102.03902.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        """Knobs of `Nystrom`.

        Attributes:
            landmarks: number of landmarks.
            iterations: steps of the pseudo-inverse.
            conv: taps of the filter on the values, odd; None for no filter.
            compat: "none", or the implementation whose numbers are wanted: "transformers" (batch
                coupling; only the third kernel is masked; landmarks must divide the tokens) or
                "nystrom-attention" (batch coupling; zeros in front of lengths that do not divide
                take part).
        """

        landmarks: Count = 64
        iterations: Count = 6
        conv: Odd | None = 33
        compat: Literal["none", "transformers", "nystrom-attention"] = "none"

        def check(self) -> None:
            if self.causal:
                raise ValueError("nystrom: has no causal form; use softmax, flow or linear")

    counts_heads = True

    def __init__(self, config: Nystrom.Config, site: Site) -> None:
        super().__init__(config, site)
        if config.conv is not None:
            heads, taps = site.heads, (config.conv, 1)
            self.conv = nn.Conv2d(
                heads, heads, taps, padding=(config.conv // 2, 0), groups=heads, bias=False
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        mask = None if ctx.mask is None else ctx.mask[:, None]
        if self.config.compat == "transformers":
            out = self._transformers(*_scaled(q, k), v, mask)
        elif self.config.compat == "nystrom-attention":
            return self._padded_in_front(q, k, v, mask)
        elif mask is None and self._exact(q):
            out = fused(q, k, v)
        elif mask is None and self._divides(q):
            out = self._kernels(q, k, self._means(q), self._means(k), v)
        else:
            v = v if mask is None else v * mask[..., None]
            out = self._grouped(q, k, v, mask)
        return self._filtered(out, v)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, **further: Tensor) -> Tensor:
        packing = ctx.packing
        if packing is None or self.config.conv is None or not packing.holes:
            return super().packed(q, k, v, ctx, **further)
        # the filter sees the places of tokens, so that a row with holes is laid out again
        packing.check_row(q, dim=2)
        apart = (packing.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        out: Tensor = self(*apart, Context(mask=packing.mask))
        return packing.pack(out.transpose(1, 2)).transpose(1, 2)

    def _filtered(self, out: Tensor, v: Tensor) -> Tensor:
        """``out + conv(v)``; as the convolution pads few channels to many, products with a band of
        its taps, a block of tokens and its neighbours at a time, are several times faster.
        """
        if self.config.conv is None:
            return out
        if capturing():
            return out + self.conv(v)
        half, slices = self.config.conv // 2, _blocks(v.shape[2], self.config.conv)
        band = _band(self.conv.weight[:, 0, :, 0], max(rows.stop - rows.start for rows in slices))
        band = band.expand(v.shape[0], -1, -1, -1).contiguous()
        ends = v.new_zeros(*v.shape[:2], half, v.shape[3])
        before, outputs = ends, Rows(v.shape[2])
        blocks = pieces(v, slices)
        for here, block, after in zip(
            pieces(out, slices), blocks, (*blocks[1:], ends), strict=True
        ):
            around = torch.cat([before, block, after[:, :, :half]], dim=2)
            taps = band[:, :, : block.shape[2], : around.shape[2]]
            outputs.append(here + taps @ around)
            before = block[:, :, block.shape[2] - half :]
        return outputs.joined()

    def _exact(self, x: Tensor) -> bool:
        return known_length(x) and x.shape[2] <= self.config.landmarks

    def _divides(self, x: Tensor) -> bool:
        return known_length(x) and x.shape[2] % self.config.landmarks == 0

    def _means(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.config.landmarks, -1)).mean(dim=3)

    def _kernels(self, q: Tensor, k: Tensor, lq: Tensor, lk: Tensor, v: Tensor) -> Tensor:
        """The fused operator keeps the first and the last kernel out of memory."""
        middle = (lq @ lk.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        coupled = self.config.compat != "none"
        inverse = iterative_pinv(middle, self.config.iterations, coupled=coupled)
        summaries = inverse @ fused(lq, k, v)
        return fused(q, lk, summaries)

    def _grouped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Groups of the valid tokens of each sample, of any number; mask (B, 1, N) or None."""
        m = self.config.landmarks
        real = torch.ones_like(q[:, :1, :, 0], dtype=torch.bool) if mask is None else mask
        count = real.sum(dim=-1, keepdim=True)
        rank = real.cumsum(dim=-1) - 1
        group = (rank * m // count.clamp(min=1)).clamp(0, m - 1)[..., None]
        sizes = torch.zeros_like(group[:, :, :1]).expand(-1, -1, m, -1)
        sizes = sizes.scatter_add(2, group, real[..., None].to(sizes.dtype))
        weight = real[..., None].to(q.dtype)

        def means(x: Tensor) -> Tensor:
            sums = torch.zeros_like(x[:, :, :1]).expand(-1, -1, m, -1)
            sums = sums.scatter_add(2, group.expand(-1, x.shape[1], -1, x.shape[3]), x * weight)
            return sums / sizes.clamp(min=1)

        lq, lk = means(q), means(k)
        filled = sizes > 0  # fewer valid tokens than landmarks leave groups empty
        scores = lq @ lk.mT * q.shape[-1] ** -0.5
        inverse = iterative_pinv(_masked(scores, filled.mT) * filled, self.config.iterations)
        summaries = attend("sdpa", lq, k, v, real[:, :, None], causal=False, scale=None)
        few = count[..., None] <= m  # every group is one token: the first kernel is exact
        summaries = torch.where(few, means(v), inverse @ summaries)
        return attend("sdpa", q, lk, summaries, filled.mT, causal=False, scale=None)

    def _transformers(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n, m = q.shape[2], self.config.landmarks
        if n % m:
            raise ValueError(
                f"{self.site.path or 'nystrom'}: compat='transformers' needs a multiple of {m} "
                f"tokens, got {n}; compat='none' takes any number"
            )
        keys = (
            torch.ones_like(k[:, :1, :1, :1], dtype=torch.bool) if mask is None else mask[:, None]
        )
        if n == m:
            return _masked(q @ k.mT, keys) @ v
        lq, lk = self._means(q), self._means(k)
        first, middle = (q @ lk.mT).softmax(dim=-1), (lq @ lk.mT).softmax(dim=-1)
        third = _masked(lq @ k.mT, keys)
        inverse = iterative_pinv(middle, self.config.iterations, coupled=True)
        return first @ (inverse @ (third @ v))

    def _padded_in_front(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n, m = q.shape[2], self.config.landmarks
        q, k, v = (F.pad(x, (0, 0, (-n) % m, 0)) for x in (q, k, v))
        if mask is None:
            out = self._kernels(q, k, self._means(q), self._means(k), v)
        else:
            real = F.pad(mask, ((-n) % m, 0))[..., None]
            q, k, v = (x * real for x in (*_scaled(q, k), v))
            sizes = real.unflatten(2, (m, -1)).sum(dim=3)
            share = q.shape[2] // m / (sizes + 1e-8)
            lq, lk, filled = self._means(q) * share, self._means(k) * share, sizes > 0
            # rows without a token are uniform in this package, as the fill makes them
            first = _masked(q @ lk.mT, real & filled.mT)
            middle = _masked(lq @ lk.mT, filled & filled.mT)
            third = _masked(lq @ k.mT, filled & real.mT)
            inverse = iterative_pinv(middle, self.config.iterations, coupled=True)
            out = first @ (inverse @ (third @ v))
        return self._filtered(out, v)[:, :, -n:]

    def select(self, heads: Tensor) -> Nystrom:
        if self.config.conv is None:
            return self
        small, conv = twin(self), twin(self.conv)
        conv.in_channels = conv.out_channels = conv.groups = len(heads)
        put(conv, "weight", self.conv.weight.index_select(0, heads))
        small.conv = conv
        return small

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        c, size = self.config, self.config.landmarks
        filtered = 0 if c.conv is None else heads * head_dim * _band_size(n, c.conv)
        if n <= size:
            return heads * 2 * n * n * head_dim + filtered
        kernels = 4 * n * size * head_dim + 2 * size * size * head_dim
        return heads * (kernels + 4 * c.iterations * size**3) + filtered


def iterative_pinv(x: Tensor, iterations: int, *, coupled: bool = False) -> Tensor:
    """Approximate pseudo-inverse of row-stochastic matrices by matrix products alone.

    ``Z <- 0.25 Z (13 I - X Z (15 I - X Z (7 I - X Z)))`` from ``Z = X^T / (r c)`` with the largest
    row and column sums r and c of each matrix.

    Args:
        x: (..., M, M), not negative.
        iterations: number of steps.
        coupled: take r and c over all matrices at once, as the published implementations do;
            a matrix's result then depends on the others.

    Returns:
        (..., M, M).
    """
    rows, columns = x.abs().sum(dim=-1), x.abs().sum(dim=-2)
    if coupled:
        scale = rows.max() * columns.max()
    else:
        scale = (rows.amax(dim=-1) * columns.amax(dim=-1))[..., None, None]
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    z = x.mT / scale.clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(iterations):
        xz = x @ z
        z = 0.25 * z @ (13 * eye - xz @ (15 * eye - xz @ (7 * eye - xz)))
    return z


def _blocks(n: int, taps: int) -> list[slice]:
    """Blocks of tokens to be filtered, each no shorter than what it lends to its neighbours, but for
    the last.
    """
    size = max(_BLOCK, taps // 2)
    return [slice(start, min(start + size, n)) for start in range(0, max(n, 1), size)]


def _band_size(n: int, taps: int) -> int:
    """Entries of the bands of all blocks: tokens times those around them."""
    half, sizes = taps // 2, [rows.stop - rows.start for rows in _blocks(n, taps)]
    following = [*sizes[1:], half]
    return sum(r * (half + r + min(half, f)) for r, f in zip(sizes, following, strict=True))


def _band(taps: Tensor, size: int) -> Tensor:
    """Filters (H, T) as matrices (H, size, size + T - 1), whose row i holds them from column i on."""
    width = size + taps.shape[1] - 1
    rows = F.pad(taps, (0, size))[:, None].expand(-1, size, -1)
    return rows.flatten(1)[:, : size * width].unflatten(1, (size, width))


def _scaled(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products carry the factor K^-0.5."""
    return q * q.shape[-1] ** -0.25, k * k.shape[-1] ** -0.25


def _masked(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
