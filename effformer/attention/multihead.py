"""Multi-head attention: projections around a core."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import EMPTY, Context, Site, check_context
from effformer.nn.cut import cut_linear, twin
from effformer.nn.norms import make_norm
from effformer.nn.rope import apply_rope
from effformer.registry import Caps, attention, core

from .base import Core, CoreConfig, Mixer
from .projections import AdaptiveProjections, Work, project
from .softmax import Softmax

__all__ = ["Attention"]


@attention.register(
    "multihead",
    caps=Caps(
        causal="optional",
        cross=True,
        mask="full",
        rope=True,
        packed=True,
        streaming=True,
        width=True,
        cost="n^2",
    ),
    paper="1706.03762",
)
class Attention(Mixer):
    """Multi-head attention around any core: ``proj(core(heads(q x), heads(k x), heads(v x)))``.

    Self-attention has one fused projection ``qkv`` (rows q, k, v; head-major inside each). The
    core's site has the width of all heads together. With ``site.memory_dim`` the part is a
    cross-attention: ``q`` reads the tokens, ``kv`` reads ``ctx.memory``. With
    ``config.projections`` the four projections ``q``, ``k``, ``v``, ``proj`` are separate, and each
    token chooses how much of each it runs.

    Args:
        config: the core and the projections.
        site: the place in the model.
        aligned: the memory holds other features of the same tokens. Masks, order, rotary angles and
            packing then mean both, as in self-attention, and the core is told of no memory.

    Raises:
        ValueError: the width is not divisible by the heads.
        CapabilityError: at call, a `Context` field that the core cannot honour.

    Reference: Attention Is All You Need, 2017, arXiv 1706.03762.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `Attention`.

        Attributes:
            core: what happens between the projections.
            qkv_bias: the input projections have biases.
            proj_bias: the output projection has a bias.
            proj: there is an output projection; without one the heads side by side are the output.
            qk_norm: queries and keys are normalised before the core (and before rotary embedding),
                per head (True) or over all heads together ("across-heads").
            qk_norm_eps: epsilon of these norms; None means that of the model's norms.
            head_dim: width of a head; None means dim / heads.
            kv_heads: number of key and value heads, each shared by heads / kv_heads query heads
                (grouped-query attention); None means one per query head.
            projections: learners in place of the projections' matrices, which then have the biases
                of the learners; None: plain matrices.
        """

        core: CoreConfig = part("core", Softmax.Config())
        qkv_bias: bool = True
        proj_bias: bool = True
        proj: bool = True
        qk_norm: bool | Literal["across-heads"] = False
        qk_norm_eps: float | None = None
        head_dim: int | None = None
        kv_heads: int | None = None
        projections: AdaptiveProjections | None = None

        def __post_init__(self) -> None:
            if self.projections is not None and not self.proj:
                raise ValueError(
                    "attention: projections has an output projection; proj must be True"
                )

        def caps(self) -> Caps:
            """What the core can do; learners skip work."""
            able = self.core.caps()
            return able if self.projections is None else replace(able, dynamic=True)

        @property
        def joined(self) -> str | None:
            """Why heads cannot be taken apart, None if they can."""
            if self.kv_heads is not None:
                return "lets heads share keys (kv_heads=None would do)"
            if self.qk_norm == "across-heads":
                return "lets heads share a norm (qk_norm=True or False would do)"
            if self.projections is not None:
                return "lets heads share learners (projections=None would do)"
            if not self.proj:
                return "has heads that are the output (proj=True would do)"
            return None

    def __init__(self, config: Attention.Config, site: Site, *, aligned: bool = False) -> None:
        super().__init__(config, site)
        if config.head_dim is None and site.dim % site.heads:
            raise ValueError(
                f"{site.path or 'attention'}: width {site.dim} is not divisible by {site.heads} heads; "
                "change heads or give head_dim"
            )
        self.heads = site.heads
        self.head_dim = config.head_dim or site.dim // site.heads
        self.kv_heads = config.kv_heads or self.heads
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{site.path or 'attention'}: {self.heads} heads cannot share {self.kv_heads} key "
                "heads; kv_heads must divide heads"
            )
        inner, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.cross = site.memory_dim is not None
        self.aligned = aligned
        self._build_projections(config, inner, kv)
        if config.qk_norm:
            together = config.qk_norm == "across-heads"
            eps = site.norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
            place = replace(site, norm_eps=eps)
            self.q_norm = make_norm(place, inner if together else self.head_dim)
            self.k_norm = make_norm(place, kv if together else self.head_dim)
        entry = core.owner(config.core)
        assert entry is not None
        memory_dim = None if aligned else site.memory_dim
        self.core: Core = entry.build(config.core, replace(site, dim=inner, memory_dim=memory_dim))
        self.drop = nn.Dropout(site.dropout)

    def _build_projections(self, config: Attention.Config, inner: int, kv: int) -> None:
        site, adaptive = self.site, config.projections
        source = site.dim if site.memory_dim is None else site.memory_dim
        out = site.out_dim or site.dim
        self.q: nn.Module
        self.proj: nn.Module
        if adaptive is not None:
            self.q = adaptive.build(site.dim, inner)
            self.k, self.v = adaptive.build(source, kv), adaptive.build(source, kv)
            self.proj = adaptive.build(inner, out)
            return
        if self.cross:
            self.q = nn.Linear(site.dim, inner, bias=config.qkv_bias)
            self.kv = nn.Linear(source, 2 * kv, bias=config.qkv_bias)
        else:
            self.qkv = nn.Linear(site.dim, inner + 2 * kv, bias=config.qkv_bias)
        if not config.proj and inner != out:
            raise ValueError(
                f"{site.path or 'attention'}: proj=False needs heads that are together as wide as "
                f"the output, but they have {inner} and {out} channels"
            )
        self.proj = nn.Linear(inner, out, bias=config.proj_bias) if config.proj else nn.Identity()

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        given, ctx = ctx, replace(ctx, memory=None) if self.aligned else ctx
        check_context(ctx, self.caps, "core", self.site.path or "attention")
        work = Work(ctx.ledger, self.site.path, ctx.complete)
        q, k, v = self._heads(x, given, work)
        if ctx.packing is not None and (ctx.mask is not None or ctx.memory is not None):
            where = self.site.path or "attention"
            raise CapabilityError(
                f"{where}: packing goes with neither mask nor memory; unpack first"
            )
        if ctx.packing is None:
            out = self.core(q, k, v, ctx)
        else:
            out = self.core.packed(q, k, v, ctx.packing)
        if ctx.width is not None:
            out = out * ctx.width[:, :, None, None].to(out.dtype)
        out = project(self.proj, out.transpose(1, 2).flatten(2), "proj", work)
        if ctx.ledger is not None and self.config.projections is not None:
            lengths = [(x.shape[1], k.shape[2])]
            if ctx.packing is not None:
                lengths = [(n, n) for n in ctx.packing.lengths]
            core = sum(self._core_macs(n, m) for n, m in lengths)
            dense = self._projection_macs(x.shape[1], k.shape[2]) + core
            ctx.ledger.work(self.site.path, (torch.stack(work.executed).sum(0) + core) / dense)
        return self.drop(out)

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        keys = n if m is None else m
        return self._projection_macs(n, keys) + self._core_macs(n, keys)

    def _core_macs(self, n: int, m: int) -> int:
        return self.core.macs(n, m, heads=self.heads, head_dim=self.head_dim)

    def _projection_macs(self, n: int, m: int) -> int:
        if self.config.projections is not None:
            return self.q.macs(n) + self.k.macs(m) + self.v.macs(m) + self.proj.macs(n)  # type: ignore[operator]
        inner, dim = self.heads * self.head_dim, self.site.dim
        source = self.site.memory_dim if self.site.memory_dim is not None else dim
        total = n * inner * (dim + (self.site.out_dim or dim) * self.config.proj)
        return total + 2 * m * source * self.kv_heads * self.head_dim

    @property
    def units(self) -> int:
        """Number of heads."""
        return self.heads

    @property
    def cut(self) -> tuple[nn.Module, ...]:
        """The projections."""
        return (self.q, self.kv, self.proj) if self.cross else (self.qkv, self.proj)

    def magnitudes(self) -> Tensor:
        """Norm of each head's rows in the input projections and columns in ``proj``, (heads,)."""
        inputs: Any = [self.q, self.kv] if self.cross else [self.qkv]
        rows = torch.cat([layer.weight for layer in inputs]).unflatten(0, (3, self.heads, -1))
        columns = self.proj.weight.unflatten(1, (self.heads, -1))  # type: ignore[operator]
        total: Tensor = rows.square().sum(dim=(0, 2, 3)) + columns.square().sum(dim=(0, 2))
        return total.sqrt()

    def select(self, units: Tensor) -> Attention:
        """The attention with some of its heads: rows of the input projections, columns of ``proj``.

        Raises:
            CapabilityError: heads share keys, a norm or learners, so that they cannot be taken apart.
        """
        where = self.site.path or "attention"
        if (why := self.config.joined) is not None:
            raise CapabilityError(f"{where}: cannot be cut to some heads, because it {why}")
        width = self.head_dim
        inner = (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
        small = twin(self)
        small.heads = small.kv_heads = len(units)
        small.site = replace(self.site, heads=len(units))
        stride = self.heads * width
        if self.cross:
            small.q = cut_linear(self.q, rows=inner)  # type: ignore[arg-type]
            small.kv = cut_linear(self.kv, rows=torch.cat([inner, inner + stride]))
        else:
            rows = torch.cat([inner, inner + stride, inner + 2 * stride])
            small.qkv = cut_linear(self.qkv, rows=rows)
        small.core = self.core.select(units)
        small.proj = cut_linear(self.proj, columns=inner)  # type: ignore[arg-type]
        return small

    def init_state(self, batch: int, *, like: Tensor) -> Any:
        """State before the first token.

        Raises:
            CapabilityError: the core has no streaming form, or is not causal.
        """
        self._check_streaming()
        return self.core.init_state(batch, heads=self.heads, head_dim=self.head_dim, like=like)  # type: ignore[operator]

    def step(self, x: Tensor, state: Any, ctx: Context = EMPTY) -> tuple[Tensor, Any]:
        """Feed the next tokens x (B, n, D).

        Raises:
            CapabilityError: the core has no streaming form, or the context carries a mask or
                factors on heads.
        """
        self._check_streaming()
        if ctx.mask is not None or ctx.width is not None:
            raise CapabilityError(
                f"{self.site.path or 'attention'}: streaming takes no mask and no width; feed real "
                "tokens only"
            )
        work = Work(None, self.site.path)
        q, k, v = self._heads(x, ctx, work)
        out, state = self.core.step(q, k, v, state)  # type: ignore[operator]
        return project(self.proj, out.transpose(1, 2).flatten(2), "proj", work), state

    def _heads(self, x: Tensor, ctx: Context, work: Work) -> tuple[Tensor, Tensor, Tensor]:
        if self.cross:
            if ctx.memory is None:
                raise CapabilityError(
                    f"{self.site.path or 'attention'}: built for cross-attention, but ctx.memory is None"
                )
        elif ctx.memory is not None:
            raise CapabilityError(
                f"{self.site.path or 'attention'}: built for self-attention, but ctx.memory is given; "
                "build it with Site(memory_dim=...)"
            )
        q, k, v = self._projected(x, x if ctx.memory is None else ctx.memory, work)
        if self.config.qk_norm == "across-heads":
            q, k = _across_heads(self.q_norm, q), _across_heads(self.k_norm, k)
        elif self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if ctx.rope is not None:
            q, k = apply_rope(q, k, ctx.rope)
        if ctx.merging is not None and not self.cross:
            ctx.merging.keys = k.mean(dim=1)
        if self.kv_heads != self.heads:
            shared = self.heads // self.kv_heads
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        if ctx.tap is not None:
            place = self.site.path
            q, k, v = (
                ctx.tap(f"{place}.{name}", x) for name, x in zip("qkv", (q, k, v), strict=True)
            )
        return q, k, v

    def _projected(self, x: Tensor, source: Tensor, work: Work) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of queries from x, of keys and values from ``source``: (B, H, N or M, K)."""
        if self.config.projections is not None:
            parts = (("q", self.q, x), ("k", self.k, source), ("v", self.v, source))
            q, k, v = (self._split(project(m, y, name, work)) for name, m, y in parts)
            return q, k, v
        if self.cross:
            kv = self.kv(source).unflatten(-1, (2, self.kv_heads, self.head_dim))
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
            return self._split(self.q(x)), k, v
        qkv = self.qkv(x)
        if self.kv_heads == self.heads:
            qkv = qkv.unflatten(-1, (3, self.heads, self.head_dim))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        counts = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self._split(qkv).split(counts, 1)
        return q, k, v

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, H K) -> (B, H, N, K)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _check_streaming(self) -> None:
        if not self.caps.streaming or not self.core.config.causal:
            able = ", ".join(core.names(streaming=True))
            raise CapabilityError(
                f"{self.site.path or 'attention'}: streaming needs a causal core with a step; "
                f"choices, with causal=True: {able}"
            )


def _across_heads(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm over the channels of all heads of x (B, H, N, K)."""
    joined: Tensor = norm(x.transpose(1, 2).flatten(2))
    return joined.unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2)
