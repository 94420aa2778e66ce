"""Heads: from tokens to queries, keys, values and whatever else a core asks for, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from effformer.checks import CapabilityError
from effformer.context import EMPTY, Context
from effformer.nn.cut import cut_linear, twin
from effformer.nn.norms import make_norm
from effformer.nn.short_conv import ShortConv
from effformer.site import Site

from .base import Mixer
from .heads_config import HeadsConfig
from .outputs import (
    HeadOutput,
    Input,
    OutputGate,
    cut_input,
    input_macs,
    input_rows,
    make_input,
    spread,
)
from .projections import Work, project
from .slices import over_sequences

__all__ = ["Heads", "HeadsConfig", "Opened"]


class Opened(NamedTuple):
    """What a core is given.

    Attributes:
        q: (B, H, N, K) queries.
        k: (B, H, M, K) keys.
        v: (B, H, M, V) values.
        further: the further inputs of the core by name, (B, H, M, width) each.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    further: dict[str, Tensor]


class Heads(Mixer):
    """The two ends of an attention: `open` gives the core its inputs, `close` projects what it made.

    Self-attention has one fused projection ``qkv`` (rows q, k, v; head-major inside each). With
    ``site.memory_dim`` queries come from the tokens by ``q``, keys and values from ``ctx.memory``
    by ``kv``. With ``config.projections`` the four projections ``q``, ``k``, ``v``, ``proj`` are
    separate, and each token chooses how much of each it runs. What a core asks for beside q, k and
    v is projected from the tokens by ``inputs.<name>``.

    Several heads side by side serve one core: a two-stream block opens and closes one `Heads` per
    stream.

    Args:
        config: the knobs.
        site: the place in the model.
        inputs: further inputs of the core.
        both: the core looks both ways along the tokens, and so does the convolution.
        closes: False: the tokens end here. Others look at them, and nothing is projected back.

    Raises:
        ValueError: the width is not divisible by the heads, or these not by those that they share.
        CapabilityError: a convolution over queries and the keys of a memory.

    Reference: Attention Is All You Need, 2017, arXiv 1706.03762.
    """

    def __init__(
        self,
        config: HeadsConfig,
        site: Site,
        inputs: Mapping[str, Input] | None = None,
        *,
        both: bool = False,
        closes: bool = True,
    ) -> None:
        super().__init__(config, site)
        self.closes = closes
        if config.head_dim is None and site.dim % site.heads:
            raise ValueError(
                f"{self.where}: width {site.dim} is not divisible by {site.heads} heads; "
                "change heads or give head_dim"
            )
        self.head_dim = config.head_width(site.dim, site.heads)
        self.heads = config.head_count(site.heads)
        self.value_dim = config.value_dim or self.head_dim
        self.q_heads = config.qk_heads or self.heads
        self.k_heads = config.qk_heads or config.kv_heads or self.heads
        self.v_heads = config.kv_heads or self.heads
        for name in ("k_heads", "v_heads"):
            if self.heads % getattr(self, name):
                raise ValueError(
                    f"{self.where}: {self.heads} heads cannot share {getattr(self, name)}; kv_heads "
                    "and qk_heads must divide heads"
                )
        self.cross = site.memory_dim is not None
        self._build_projections(config)
        if config.qk_norm:
            rule = site.norm
            eps = rule.eps if config.qk_norm_eps is None else config.qk_norm_eps
            place = replace(site, norm=replace(rule, kind=rule.qk_kind or rule.kind, eps=eps))
            together = config.qk_norm == "across-heads"
            counts = (self.q_heads, self.k_heads) if together else (1, 1)
            self.q_norm, self.k_norm = (make_norm(place, n * self.head_dim) for n in counts)
        if config.short_conv:
            channels = (self.q_heads + self.k_heads) * self.head_dim
            channels += self.v_heads * self.value_dim
            self.conv = ShortConv(
                channels, config.short_conv, bias=config.short_conv_bias, both=both
            )
        source = site.source_dim
        self.inputs = nn.ModuleDict(
            {
                name: make_input(source, self.heads * i.width, rank=i.rank, bias=i.bias)
                for name, i in (inputs or {}).items()
            }
        )
        gate = config.gate
        self.output: nn.Module | None = None
        if isinstance(gate, OutputGate) and closes:
            self.output = HeadOutput(gate, site.dim, self.heads, self.value_dim)
        self.drop = nn.Dropout(site.dropout)

    @property
    def where(self) -> str:
        """The place, for messages."""
        return self.site.path or "attention"

    def _build_projections(self, config: HeadsConfig) -> None:
        site, adaptive = self.site, config.projections
        q, k = self.q_heads * self.head_dim, self.k_heads * self.head_dim
        v, inner = self.v_heads * self.value_dim, self.heads * self.value_dim
        source = site.source_dim
        out = site.out_dim or site.dim
        self.q: nn.Module
        self.proj: nn.Module
        if adaptive is not None:
            self.q = adaptive.build(site.dim, q)
            self.k, self.v = adaptive.build(source, k), adaptive.build(source, v)
            self.proj = adaptive.build(inner, out) if self.closes else nn.Identity()
            return
        if self.cross:
            self.q = nn.Linear(site.dim, q, bias=config.qkv_bias)
            self.kv = nn.Linear(source, k + v, bias=config.qkv_bias)
        else:
            self.qkv = nn.Linear(site.dim, q + k + v, bias=config.qkv_bias)
        if not self.closes:
            self.proj = nn.Identity()
            return
        if not config.proj and inner != out:
            raise ValueError(
                f"{self.where}: proj=False needs heads that are together as wide as the output, but "
                f"they have {inner} and {out} channels"
            )
        self.proj = nn.Linear(inner, out, bias=config.proj_bias) if config.proj else nn.Identity()

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        raise CapabilityError(
            f"{self.where}: heads of one stream mix nothing alone; the block calls open and close"
        )

    def open(
        self, x: Tensor, ctx: Context, work: Work, past: Tensor | None = None
    ) -> tuple[Opened, Tensor | None]:
        """What the core is given for tokens x (B, N, D); rotary tables are not applied yet.

        Args:
            x: the tokens.
            ctx: the context.
            work: where learners report.
            past: state of the convolution behind the tokens before these, None for none.

        Returns:
            The core's inputs, and the state of the convolution behind these tokens.

        Raises:
            CapabilityError: a memory without place, or the other way round.
        """
        source = self._source(x, ctx)
        q, k, v = self._projected(x, source, work)
        state = None
        if self.config.short_conv:
            q, k, v, state = self._convolved(q, k, v, ctx, past)
        further = {
            name: p(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, p in self.inputs.items()
        }
        q, k = self._normed("q_norm", self._split(q)), self._normed("k_norm", self._split(k))
        return Opened(q, k, self._split(v, self.value_dim), further), state

    def queries(self, x: Tensor, work: Work) -> Tensor:
        """The queries alone of heads that look at a memory: (B, H, N, K)."""
        return self._normed("q_norm", self._split(project(self.q, x, "q", work)))

    def share(self, opened: Opened) -> Opened:
        """One key and value for every query head of a group."""
        if self.v_heads == self.heads:
            return opened
        k, v = (x.repeat_interleave(self.heads // x.shape[1], dim=1) for x in opened[1:3])
        return opened._replace(k=k, v=v)

    def tapped(self, opened: Opened, ctx: Context) -> Opened:
        """Taps see, and may change, ``<path>.q``, ``.k``, ``.v`` and ``.<further input>``."""
        if ctx.tap is None:
            return opened
        path, further = self.site.path, opened.further
        q, k, v = (ctx.tap(f"{path}.{n}", x) for n, x in zip("qkv", opened[:3], strict=True))
        return Opened(q, k, v, {n: ctx.tap(f"{path}.{n}", y) for n, y in further.items()})

    def close(self, out: Tensor, x: Tensor, ctx: Context, work: Work) -> Tensor:
        """What the core made (B, H, N, V) of tokens x, in their precision or a higher one, back to
        tokens (B, N, D).
        """
        if self.output is not None:
            out = self.output(out, x)
        if out.dtype.itemsize > x.dtype.itemsize:
            out = out.to(x.dtype)
        if ctx.width is not None:
            out = out * _spread_width(ctx.width, ctx)[..., None].to(out.dtype)
        out = out.transpose(1, 2).flatten(2)
        if self.config.projections is None:
            return self.drop(self.proj(out))
        return self.drop(project(self.proj, out, "proj", work))

    def _source(self, x: Tensor, ctx: Context) -> Tensor:
        """Where keys and values come from."""
        if not self.cross:
            if ctx.remembered is not None:
                raise CapabilityError(
                    f"{self.where}: built for self-attention, but ctx.memory is given; build it with "
                    "Site(memory_dim=...)"
                )
            return x
        memory = ctx.remembered
        if memory is None:
            raise CapabilityError(
                f"{self.where}: built for cross-attention, but ctx.memory is None"
            )
        return memory

    def _projected(self, x: Tensor, source: Tensor, work: Work) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from x, keys and values from ``source``, heads side by side."""
        if self.config.projections is not None:
            parts = (("q", self.q, x), ("k", self.k, source), ("v", self.v, source))
            q, k, v = (project(m, y, name, work) for name, m, y in parts)
            return q, k, v
        widths = self._widths()
        if self.cross:
            k, v = self.kv(source).split(widths[1:], dim=-1)
            return self.q(x), k, v
        q, k, v = self.qkv(x).split(widths, dim=-1)
        return q, k, v

    def _widths(self) -> list[int]:
        """Channels of all queries, keys and values."""
        k, v = self.head_dim, self.value_dim
        return [self.q_heads * k, self.k_heads * k, self.v_heads * v]

    def _convolved(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, past: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The short convolution; padding reads as nothing, packed sequences do not meet."""
        if ctx.mask is not None and ctx.mask.dim() != 2:
            raise CapabilityError(
                f"{self.where}: a mask over pairs says nothing about the taps of the convolution "
                f"(short_conv={self.config.short_conv}); a mask (B, N), or short_conv=0 would do"
            )
        joined = torch.cat([q, k, v], dim=-1)
        if ctx.mask is not None:
            joined = joined * ctx.mask[..., None].to(joined.dtype)
        if ctx.packing is None:
            joined, state = self.conv(joined, past)
        elif ctx.packing.holes:
            joined = ctx.packing.pack(self.conv(ctx.packing.unpack(joined))[0])
            state = None
        else:
            joined = over_sequences(lambda one, _: self.conv(one)[0], joined, ctx)
            state = None
        q, k, v = joined.split(self._widths(), dim=-1)
        return q, k, v, state

    def _split(self, x: Tensor, width: int | None = None) -> Tensor:
        """(B, N, H K) -> (B, H, N, K)."""
        return x.unflatten(-1, (-1, width or self.head_dim)).transpose(1, 2)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        """Queries or keys (B, H, N, K) behind their norm."""
        if not self.config.qk_norm:
            return x
        norm = getattr(self, name)
        if self.config.qk_norm != "across-heads":
            return norm(x)
        joined: Tensor = norm(x.transpose(1, 2).flatten(2))
        return joined.unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2)

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        """Dense multiply-adds of both ends for one sample."""
        keys = n if m is None else m
        if self.config.projections is not None:
            parts = [(self.q, n), (self.k, keys), (self.v, keys)]
            parts += [(self.proj, n)] if self.closes else []
            return sum(part.macs(count) for part, count in parts)  # type: ignore[operator]
        q, k, v = self._widths()
        dim, source = self.site.dim, self.site.source_dim
        total = n * dim * q + keys * source * (k + v)
        if self.config.proj and self.closes:
            total += n * self.heads * self.value_dim * (self.site.out_dim or dim)
        if self.config.short_conv:
            total += self.conv.macs(n)
        if self.output is not None:
            total += self.output.macs(n)  # type: ignore[operator]
        return total + keys * sum(map(input_macs, self.inputs.values()))

    @property
    def units(self) -> int:
        """Number of heads."""
        return self.heads

    @property
    def bundle(self) -> int:
        """How many heads beside each other can only be cut together: those of one key."""
        return self.heads // min(self.q_heads, self.k_heads, self.v_heads)

    def _bundled(self, units: Tensor, count: int) -> Tensor:
        """Which of ``count`` queries, keys or values these heads read."""
        each = self.heads // count
        if each == 1:
            return units
        whole = units.view(-1, each) if len(units) % each == 0 else units[:, None]
        first = whole[:, :1] // each
        if not torch.equal(whole, first * each + torch.arange(each, device=units.device)):
            raise CapabilityError(
                f"{self.where}: {each} heads share a key each, and can only be cut together"
            )
        return first[:, 0]

    @property
    def cut(self) -> tuple[nn.Module, ...]:
        """The projections."""
        ends = (self.proj,) if self.closes else ()
        return (self.q, self.kv, *ends) if self.cross else (self.qkv, *ends)

    def magnitudes(self) -> Tensor:
        """Norm of each head's rows in the input projections and columns in ``proj``, (heads,)."""
        # those of a memory have its width, so that rows of both make no one matrix
        inputs = (self.q, self.kv) if self.cross else (self.qkv,)
        squares = torch.cat([one.weight.square().sum(dim=1) for one in inputs])  # type: ignore[operator]
        parts = [r.unflatten(0, (self.heads, -1)).sum(dim=1) for r in squares.split(self._widths())]
        if self.closes:
            columns = self.proj.weight.unflatten(1, (self.heads, -1))  # type: ignore[operator]
            parts.append(columns.square().sum(dim=(0, 2)))
        return torch.stack(parts).sum(dim=0).sqrt()

    def select(self, units: Tensor) -> Self:
        """The same with some of the heads: rows of the input projections, columns of ``proj``.

        Raises:
            CapabilityError: heads share a norm or learners, so that they cannot be taken apart, or
                keys that others of them keep: those go in bundles of `bundle`.
        """
        if (why := self.config.inseparable) is not None:
            raise CapabilityError(f"{self.where}: cannot be cut to some heads, because it {why}")
        q, k, _ = self._widths()
        own = [self._bundled(units, n) for n in (self.q_heads, self.k_heads, self.v_heads)]
        values = spread(units, self.value_dim)
        rows_q, rows_k = (spread(one, self.head_dim) for one in own[:2])
        rows_v = spread(own[2], self.value_dim)
        small = twin(self)
        small.heads = units.shape[0]
        small.q_heads, small.k_heads, small.v_heads = (one.shape[0] for one in own)
        if isinstance(small.heads, int):  # in a graph it is a number that nobody knows
            small.site = replace(self.site, heads=small.heads)
        if self.cross:
            small.q = cut_linear(self.q, rows=rows_q)  # type: ignore[arg-type]
            small.kv = cut_linear(self.kv, rows=torch.cat([rows_k, rows_v + k]))
        else:
            rows = torch.cat([rows_q, rows_k + q, rows_v + q + k])
            small.qkv = cut_linear(self.qkv, rows=rows)
            if self.config.short_conv:
                small.conv = self.conv.select(rows)
        if self.inputs:
            small.inputs = twin(self.inputs)
            for name, part in self.inputs.items():
                every = torch.arange(input_rows(part), device=units.device)
                own = every.unflatten(0, (self.heads, -1)).index_select(0, units).flatten()
                small.inputs[name] = cut_input(part, own)
        if isinstance(self.output, HeadOutput):
            small.output = self.output.select(units, self.value_dim)
        if self.closes:
            small.proj = cut_linear(self.proj, columns=values)  # type: ignore[arg-type]
        return small


def _spread_width(width: Tensor, ctx: Context) -> Tensor:
    """Factors (B, U) on units for every token: (B, U, 1), in a packed row (1, U, T)."""
    if ctx.packing is None:
        return width[..., None]
    return ctx.packing.spread(width).mT
