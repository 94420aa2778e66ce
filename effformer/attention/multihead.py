"""Multi-head attention: heads around a core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from effformer import registry
from effformer.checks import CapabilityError, check_batch, check_state
from effformer.config import part
from effformer.context import EMPTY, Context, Rope, check_context, explained
from effformer.registry import Caps, Entry, attention, core
from effformer.site import Site

from .base import Core, CoreConfig, check_streamed
from .heads import Heads, HeadsConfig, Opened
from .outputs import Input
from .projections import Work
from .softmax import Softmax

__all__ = ["Attention", "AttentionState"]


class AttentionState(NamedTuple):
    """What an attention remembers while tokens are fed piece by piece.

    Attributes:
        core: state of the core; of a cross-attention, what it made of the memory.
        conv: the last inputs of the convolution, None if there is none.
        of: name of the core; empty: any.
    """

    core: Any
    conv: Tensor | None = None
    of: str = ""


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
        multihead=True,
        cost="n^2",
    ),
    paper="1706.03762",
)
class Attention(Heads):
    """Multi-head attention around any core: ``close(core(open(x)))``, see `Heads`.

    The core's site has the width of all heads together. With ``site.memory_dim`` the part is a
    cross-attention: ``ctx.memory_mask`` is its mask.

    Args:
        config: the core and the heads.
        site: the place in the model.
        aligned: the memory holds other features of the same tokens. Masks, order, rotary angles and
            packing then mean both, as in self-attention, and the core is told of no memory.

    Raises:
        ValueError: the width is not divisible by the heads.
        CapabilityError: the core cannot work with these heads; at call, a `Context` field that the
            core cannot honour.

    Reference: Attention Is All You Need, 2017, arXiv 1706.03762.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(HeadsConfig):
        """Knobs of `Attention`, beside those of `HeadsConfig`.

        Attributes:
            core: what happens between the heads.
        """

        core: CoreConfig = part("core", Softmax.Config())

        def caps(self) -> Caps:
            """What the core can do; learners skip work. A convolution reads neighbours, which must be
            tokens of one sequence in their order.
            """
            able = replace(self.core.caps(), multihead=True)
            if self.short_conv:
                mask: Literal["none", "key"] = "none" if able.mask == "none" else "key"
                able = replace(able, mask=mask, cross=False, order_free=False, sizes=False)
            return able if self.projections is None else replace(able, dynamic=True)

        @property
        def title(self) -> str:
            """The name of the core."""
            return self.core.title

        def inputs(self, site: Site) -> Mapping[str, Input]:
            """What the core asks for beside queries, keys and values, of the heads at a site.

            Raises:
                CapabilityError: the core cannot work with these heads.
            """
            width = self.head_width(site.dim, site.heads)
            values = self.value_dim or width
            heads = self.head_count(site.heads)
            grouped = self.qk_heads not in (None, heads) or values != width
            if grouped and not self.core.GROUPED:
                able = ", ".join(e.name for e in core if getattr(e.config, "GROUPED", False))
                raise CapabilityError(
                    f"{site.path or 'attention'}: {self.title!r} has as many keys as values, and of "
                    f"the same width; qk_heads=None and value_dim=None, or choices: {able}"
                )
            return self.core.inputs(width, values)

        def build_core(self, site: Site) -> Core:
            """The core alone, between heads at a site."""
            width = self.head_width(site.dim, site.heads)
            values = self.value_dim or width
            heads = self.head_count(site.heads)
            inside = replace(site, heads=heads, dim=heads * width, out_dim=heads * values)
            made: Core = self.core.build(inside)
            return made

    def __init__(self, config: Attention.Config, site: Site, *, aligned: bool = False) -> None:
        if site.memory_dim is not None and not aligned:
            _check_far(config, site.path or "attention")
        super().__init__(config, site, config.inputs(site), both=not config.core.causal)
        self.aligned = aligned
        self.core = config.build_core(replace(site, memory_dim=None) if aligned else site)
        self.kept: Tensor | None = None  # heads of the whole attention that a form of it has

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        given, ctx = ctx, replace(ctx, memory=None) if self.aligned else ctx
        self._check(ctx, x)
        work = Work(ctx.ledger, self.site.path, ctx.complete)
        opened, _ = self.open(x, given, work)
        out = self.mix(opened, ctx)
        y = self.close(out, x, ctx, work)
        if ctx.ledger is not None and self.config.projections is not None:
            self._report(x.shape[1], opened.k.shape[2], ctx, work)
        return y

    def mix(self, opened: Opened, ctx: Context) -> Tensor:
        """What the core makes of its inputs: (B, H, N, V)."""
        q, k, v, further = self._turned(opened, ctx)
        inside = self._inside(ctx)
        if ctx.packing is None:
            return self.core(q, k, v, inside, **further)
        return self.core.packed(q, k, v, inside, **further)

    def _turned(self, opened: Opened, ctx: Context) -> Opened:
        """The core's inputs with rotary angles where it wants them, and with shared keys."""
        rope = self._rope(ctx)
        if rope is not None and self.core.rotates == "qk":
            q, k = rope.query(opened.q), rope.key(opened.k)
            opened = opened._replace(q=q, k=k)
        if ctx.merging is not None and not self.cross:
            ctx.merging.keys = opened.k.mean(dim=1)
        return self.tapped(self.share(opened), ctx)

    def _inside(self, ctx: Context) -> Context:
        """The context of the core: rotary tables only if it turns by itself, the mask of its keys."""
        if ctx.rope is not None:
            ctx = replace(ctx, rope=None if self.core.rotates == "qk" else self._rope(ctx))
        return ctx.far() if self.cross and not self.aligned else ctx

    def _rope(self, ctx: Context) -> Rope | None:
        """The tables of the heads that are left."""
        if ctx.rope is None or self.kept is None:
            return ctx.rope
        return ctx.rope.heads(self.kept)

    def _check(self, ctx: Context, x: Tensor) -> None:
        """Refuse what the core cannot honour, and masks of the wrong tokens."""
        if all(
            x is None for x in (ctx.mask, ctx.memory_mask, ctx.memory, ctx.rope, ctx.width)
        ) and (ctx.packing is None and ctx.merging is None):
            return
        far = self.cross and not self.aligned
        if far and ctx.mask is not None:
            raise CapabilityError(
                f"{self.where}: ctx.mask is about the tokens, but this attention looks at the memory; "
                "give its mask as ctx.memory_mask"
            )
        if not far and ctx.memory_mask is not None:
            raise CapabilityError(
                f"{self.where}: ctx.memory_mask is about a memory, but this attention looks at the "
                "tokens; give their mask as ctx.mask"
            )
        if far and ctx.rope is not None and ctx.rope.key_cos is None:
            raise CapabilityError(
                f"{self.where}: rotary tables of the queries alone would turn one side only; give "
                "key_cos and key_sin for the memory, or no tables"
            )
        check_context(ctx.far() if far else ctx, self.caps, "attention", self.where, x)
        if ctx.packing is not None:
            for name in ("mask", "memory", "merging"):
                if getattr(ctx, name) is not None:
                    raise CapabilityError(
                        f"{self.where}: packing goes with neither mask nor memory nor merging, and "
                        f"ctx.{name} is given; unpack first"
                    )

    def _report(self, n: int, m: int, ctx: Context, work: Work) -> None:
        """Write the share of the work that learners executed."""
        assert ctx.ledger is not None
        lengths = [(n, m)] if ctx.packing is None else [(k, k) for k in ctx.packing.lengths]
        mixed = sum(self._core_macs(n, m) for n, m in lengths)
        dense = super().macs(n, m) + mixed
        ctx.ledger.work(self.site.path, (torch.stack(work.executed).sum(0) + mixed) / dense)

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        return super().macs(n, m) + self._core_macs(n, n if m is None else m)

    def _core_macs(self, n: int, m: int) -> int:
        return self.core.macs(n, m, heads=self.heads, head_dim=self.head_dim)

    @property
    def counts_units(self) -> bool:
        """No graph can be captured for an unknown number of heads."""
        own = self.output is not None or self.config.short_conv or len(self.inputs)
        return bool(own) or self.core.counts_heads

    def select(self, units: Tensor) -> Attention:
        """The attention with some of its heads.

        Raises:
            CapabilityError: heads cannot be taken apart.
        """
        small = super().select(units)
        small.core = self.core.select(units)
        small.kept = units if self.kept is None else self.kept.index_select(0, units)
        return small

    @explained
    def init_state(self, batch: int, *, like: Tensor) -> AttentionState:
        """State before the first token; a cross-attention has seen no memory yet.

        Raises:
            CapabilityError: the core has no streaming form, or is not causal.
        """
        check_batch(batch, where=f"{self.where}: init_state")
        if self.cross and not self.aligned:
            return AttentionState((), of=self.config.title)
        self._check_streaming()
        state = self.core.init_state(batch, heads=self.heads, head_dim=self.head_dim, like=like)
        conv = self.conv.init_state(batch, like=like) if self.config.short_conv else None
        return AttentionState(state, conv, self.config.title)

    @explained
    def step(
        self, x: Tensor, state: AttentionState, ctx: Context = EMPTY
    ) -> tuple[Tensor, AttentionState]:
        """Feed the next tokens x (B, n, D). A cross-attention projects the memory once.

        Raises:
            CapabilityError: the core has no streaming form, or the context carries a mask of the
                tokens or factors on heads.
            TypeError: no state of an attention.
            ValueError: the state of another core, or of other samples.
        """
        check_state(state, AttentionState, x.shape[0], where=f"{self.where}: step")
        if state.of not in ("", self.config.title):
            raise ValueError(
                f"{self.where}: step: the state is one of {state.of!r}, but this attention mixes by "
                f"{self.config.title!r}; begin with its own init_state"
            )
        check_streamed(ctx, self.where)
        self._check(ctx, x)
        work = Work(None, self.site.path)
        if self.cross and not self.aligned:
            if self.core.competes:
                raise CapabilityError(
                    f"{self.where}: queries of {self.config.title!r} compete for the memory, so that "
                    f"later ones would change what was said; choices: {', '.join(steady())}"
                )
            seen = self._remembered(x, state, ctx, work)
            return self.close(self.mix(seen, ctx), x, ctx, work), AttentionState(
                tuple(seen[1:]), of=self.config.title
            )
        self._check_streaming()
        opened, conv = self.open(x, ctx, work, state.conv)
        q, k, v, further = self._turned(opened, ctx)
        out, inner = self.core.step(q, k, v, state.core, self._inside(ctx), **further)
        return self.close(out, x, ctx, work), AttentionState(inner, conv, self.config.title)

    def _remembered(self, x: Tensor, state: AttentionState, ctx: Context, work: Work) -> Opened:
        """Queries of these tokens; keys and values of the memory from the state, if it has them."""
        if not state.core:
            return self.open(x, ctx, work)[0]
        return Opened(self.queries(x, work), *state.core)

    def _check_streaming(self) -> None:
        if not self.caps.streaming or not self.core.config.causal:
            able = ", ".join(attention.names(streaming=True))
            raise CapabilityError(
                f"{self.where}: streaming needs a causal core with a step; "
                f"choices, with causal=True: {able}"
            )


def _check_far(config: Attention.Config, where: str) -> None:
    """Refuse what a memory of other tokens cannot have."""
    if config.core.causal:
        raise CapabilityError(
            f"{where}: {config.title!r} has causal=True, but tokens and memory have no order in "
            "common; causal=False would do"
        )
    if config.short_conv:
        raise CapabilityError(
            f"{where}: the convolution (short_conv={config.short_conv}) reads queries, keys and values of the "
            "same tokens, and a memory has others; short_conv=0 would do"
        )


def steady() -> list[str]:
    """Names of cores whose queries look at a memory one by one."""
    return sorted(e.name for e in core if e.caps.cross and not e.build.competes)  # type: ignore[attr-defined]


def _add_attention(entry: Entry) -> None:
    """Make the attention around a core that was registered."""
    around = Entry(
        name=entry.name, kind="attention", build=Attention, config=Attention.Config,
        caps=replace(entry.caps, multihead=True), paper=entry.paper, summary=entry.summary,
        aliases=entry.aliases, core=entry.name, facts=entry.facts,
    )  # fmt: skip
    registry.attention.add(around)


core.follow(_add_attention)
