"""Two streams of tokens that meet in one attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from effformer import registry
from effformer.attention import Attention, Heads, Meeting
from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.context import EMPTY, Context, check_context
from effformer.nn.cut import Forms, twin
from effformer.nn.gates import values_known
from effformer.nn.norms import Modulation
from effformer.registry import Caps, block
from effformer.site import Site
from effformer.values import Natural

from .base import Block, Branch, below, ffn_branches, make_mixer

__all__ = ["Joint"]


@block.register(
    "joint",
    caps=Caps(
        cond="optional", sequential=True, packed=True, mixer_only=True, multihead=True, width=True,
        joint=True,
    ),
    paper="2403.03206",
)  # fmt: skip
class Joint(Block):
    """Two streams, each with norms, heads, FFN and modulation of its own, and one core that mixes
    the tokens of both (MMDiT, the double blocks of FLUX).

    ``block(x, y, ctx, y_ctx) -> (x, y)``, for s = x, y::

        q_s, k_s, v_s = heads_s.open(norm(s) * (1 + scale_s) + shift_s)
        [o_y | o_x]   = core([q_y | q_x], [k_y | k_x], [v_y | v_x])
        s = s + gate_s * heads_s.close(o_s)
        s = s + gate'_s * ffn_s(norm(s) * (1 + scale'_s) + shift'_s)

    x is the stream that the model returns (an image), y the one that goes with it (a text). Each
    has its own `Context`: what stands in ``mask``, ``positions``, ``rope``, ``grid`` and ``packing``
    is about its own tokens. A stream without rotary tables has no places. What both share (``cond``,
    ``time``, ``ledger``, ``tap``, ``complete``) stands in both. Either stream may be packed, or both;
    masks are key masks (B, N). To a core that reads its tokens in a row, those of y come first; a
    convolution in the heads runs along each stream alone.

    The streams are blocks, ``x`` and ``y``, with branches ``attn`` (a `Heads` each) and ``ffn``; they
    hold the slots ``width`` and ``tokens``. A head is one head of both streams: the gates over time
    of ``x.width`` switch it in both, and `select` takes it out of both and of the core.

    In the first ``config.dual`` blocks of a stack (MMDiT-X) x has a branch ``attn2``, an attention of
    the same kind over its own tokens. It reads what ``attn`` reads, x in front of the block::

        x = x + gate_x * heads_x.close(o_x) + gate2 * attn2(norm2(x) * (1 + scale2) + shift2)

    In the last block of a stack y ends (``config.ends``): x looks at it once more, and it is
    returned as it came. Its stream then has neither output projection nor FFN, and is modulated by
    shift and scale only.

    Args:
        config: the knobs.
        site: the place in the model.
        attn: config of the attention, with any core that is free of order or can be causal.
        ffn: config of the position-wise network of each stream, None for none.

    Raises:
        CapabilityError: the token mixer has no queries that streams could share; at call, a context
            field that the core cannot honour, or that two streams cannot.

    Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv
    2403.03206.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `Joint`.

        Attributes:
            ends: y ends in the last block of a stack; False: all blocks are alike (FLUX).
            dual: in how many of the first blocks of a stack x has a second attention, over its own
                tokens (SD3.5 medium: 13).
        """

        ends: bool = True
        dual: Natural = 0

    def __init__(
        self, config: Joint.Config, site: Site, *, attn: BaseConfig, ffn: BaseConfig | None
    ) -> None:
        super().__init__({}, replace(site, cond_dim=None))  # branches and modulation: the streams'
        self.site, self.config = site, config
        self.where = site.path or "joint"
        self.ends = config.ends and site.layer == site.depth - 1
        if not attn.caps().multihead:
            able = ", ".join(registry.core.names(order_free=True))
            raise CapabilityError(
                f"{self.where}: {attn.title!r} has no queries, keys and values that two streams "
                f"could share; choices: {able}"
            )
        around = cast(Attention.Config, attn)
        self.x = self._stream("x", around, ffn, dual=site.layer < config.dual)
        self.y = self._stream("y", around, ffn, ends=self.ends)
        self.core = around.build_core(below(site, "core", memory_dim=None))
        self.joined = around.joined

    def _stream(
        self, name: str, attn: Attention.Config, ffn: BaseConfig | None, *,
        ends: bool = False, dual: bool = False,
    ) -> Block:  # fmt: skip
        site = below(self.site, name, memory_dim=None)
        here = below(site, "attn")
        heads = Heads(attn, here, attn.inputs(here), both=True, closes=not ends)
        heads.caps = replace(heads.caps, width=False)  # only those of both streams can be cut
        place = replace(here, layer_scale=None, drop_path=0.0) if ends else here
        branches = {"attn": Branch(heads, place)}
        if dual:
            own = below(site, "attn2")
            branches["attn2"] = Branch(make_mixer(attn, own), own)
        stream = Block(branches | ffn_branches(None if ends else ffn, site), site)
        if ends and site.cond_dim is not None:
            stream.modulation = Modulation(site.cond_dim, site.dim, 2)
        return stream

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches of x, then those of y."""
        return self.x.branches + self.y.branches

    def attach(self, *, width: BaseConfig | None = None, tokens: BaseConfig | None = None) -> None:
        """Fill the slots of both streams; None leaves a slot as it is."""
        self.x.attach(width=width, tokens=tokens)
        self.y.attach(tokens=tokens)
        if width is not None:  # that of x has the gates of the heads
            own = dict(zip(self.y.order[1:], self.y.branches[1:], strict=True))
            self.y.width = width.build(below(self.y.site, "width"), own)

    def forward(  # type: ignore[override]
        self, x: Tensor, y: Tensor, ctx: Context = EMPTY, y_ctx: Context = EMPTY
    ) -> tuple[Tensor, Tensor]:
        """(B, N, D) and (B, M, D) -> the same; in a packed row N or M counts all tokens."""
        streams, ctxs, tokens = (self.y, self.x), (y_ctx, ctx), (y, x)
        self._check(ctxs, tokens)
        modulated = self.site.cond_dim is not None
        mods = [s.modulations(c) if modulated else None for s, c in zip(streams, ctxs, strict=True)]
        attns = [stream.branches[0] for stream in streams]
        opened = [a.enter(t, m) for a, t, m in zip(attns, tokens, mods, strict=True)]
        made = []
        mixed = self.meet(opened, ctxs)
        for stream, attn, c, s, m, h in zip(streams, attns, ctxs, tokens, mods, mixed, strict=True):
            if h is None:
                made.append(s)
                continue
            if c.tap is not None:
                h = c.tap(attn.site.path, h)
            made.append(self._after(stream, s, attn.leave(s, h, m), c, m))
        return made[1], made[0]

    def _after(
        self, stream: Block, before: Tensor, s: Tensor, ctx: Context,
        mods: tuple[Tensor, ...] | None,
    ) -> Tensor:  # fmt: skip
        """A stream s behind what it got of both: a second attention reads it as it was before."""
        name, start = "attn2", 1
        if name in stream.order:
            second, own = getattr(stream, name), None if mods is None else mods[3:6]
            h = second.run(second.enter(before, own), stream.narrowed(name, before, ctx))
            s, start = second.leave(s, h, own), 2
        return stream.walk(s, ctx, mods, start=start)

    def _check(self, ctxs: Sequence[Context], tokens: Sequence[Tensor]) -> None:
        """Refuse what two streams, or the core, cannot honour."""
        packed = any(c.packing is not None for c in ctxs)
        for c, x in zip(ctxs, tokens, strict=True):
            for name in ("merging", "stream"):
                if getattr(c, name) is not None:
                    raise CapabilityError(f"{self.where}: two streams do not take ctx.{name}")
            if c.mask is not None and c.mask.dim() != 2:
                shape = tuple(c.mask.shape)
                raise CapabilityError(
                    f"{self.where}: a stream takes a key mask (B, N), got {shape}"
                )
            if c.mask is not None and packed:
                raise CapabilityError(
                    f"{self.where}: a packed stream goes with no mask, in either stream; pack both"
                )
            check_context(c, self.meeting.heads[0].config.caps(), "attention", self.where, x)

    def meet(self, hs: list[Tensor], ctxs: Sequence[Context]) -> list[Tensor | None]:
        """The attention with the heads that are switched on: by multiplying in training and in
        graphs, else by those heads alone.
        """
        whole = self.meeting
        width = None
        if self.x.width is not None and not ctxs[1].complete:
            width = self.x.width("attn", ctxs[1])
        if width is None:
            return whole.mix(hs, ctxs)
        if ctxs[1].ledger is not None:
            whole.report(ctxs[1].ledger, hs, ctxs, width.mean(dim=1))
        gated = [replace(c, width=width) for c in ctxs]
        if self.training or ctxs[1].tap is not None or not values_known(width) or not whole.plain:
            return whole.mix(hs, gated)
        patterns, which = (width > 0).unique(dim=0, return_inverse=True)
        if len(patterns) == 1:
            return self._some(patterns[0]).mix(hs, ctxs)
        if any(c.packing is not None for c in ctxs):  # one row cannot be taken apart by samples
            return whole.mix(hs, gated)
        groups, pieces = [(which == i).nonzero().flatten() for i in range(len(patterns))], []
        for pattern, rows in zip(patterns, groups, strict=True):
            own = [h.index_select(0, rows) for h in hs]
            pieces.append(self._some(pattern).mix(own, [c.rows(rows) for c in ctxs]))
        back = torch.cat(groups).argsort()
        return [
            None if some[0] is None else torch.cat(some).index_select(0, back)
            for some in zip(*pieces, strict=True)
        ]

    @property
    def meeting(self) -> Meeting:
        """The heads of y and of x, and the core between them."""
        return Meeting((self.y.branches[0].part, self.x.branches[0].part), self.core)  # type: ignore[arg-type]

    def _some(self, active: Tensor) -> Meeting:
        """The same with the heads that are active (H,)."""
        attns = (self.y.branches[0], self.x.branches[0])
        heads = tuple(attn.forms.form(attn.part, active) for attn in attns)
        return Meeting(heads, self.core.select(active.nonzero().flatten()))  # type: ignore[arg-type]

    def macs(
        self, n: int, m: int | tuple[int, ...] | None = None, *, grid: tuple[int, ...] | None = None
    ) -> int:
        """Dense multiply-adds of one sample with n tokens in x and m in y (None: n)."""
        assert not isinstance(m, tuple)
        m = n if m is None else m
        return self.x.macs(n, grid=grid) + self.y.macs(m) + self.meeting.core_macs(n + m)

    @property
    def units(self) -> int:
        """Number of heads."""
        return self.meeting.heads[0].units

    def magnitudes(self) -> Tensor:
        """Norm of the weights of each head in both streams, (heads,)."""
        parts = torch.stack([heads.magnitudes() for heads in self.meeting.heads])
        return parts.square().sum(dim=0).sqrt()

    def select(self, units: Tensor) -> Joint:
        """The block with some of its heads (int64 indices), in both streams and in the core.

        Raises:
            CapabilityError: heads cannot be taken apart, or have gates over time.
        """
        if self.x.width is not None and len(units) != self.units:
            raise CapabilityError(
                f"{self.where}: heads with gates over time cannot be cut; build with width=None"
            )
        small = twin(self)
        small.site = replace(self.site, heads=len(units))
        for name in ("x", "y"):
            stream = twin(getattr(self, name))
            attn = twin(stream.branches[0])
            attn.part, attn.forms = attn.part.select(units), Forms()
            setattr(stream, "attn", attn)  # noqa: B010  # a child of the twin
            setattr(small, name, stream)
        small.core = self.core.select(units)
        return small
