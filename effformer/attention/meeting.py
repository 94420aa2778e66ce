"""One core for the heads of several streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effformer.context import Context, Ledger, Packing, Rope

from .base import Core
from .heads import Heads, Opened
from .projections import Work

__all__ = ["Meeting"]


class Meeting(NamedTuple):
    """Heads that meet in one core: ``[o_1 | o_2] = core([q_1 | q_2], [k_1 | k_2], [v_1 | v_2])``, the
    tokens of the streams one behind the other.

    Every stream has a context of its own for what is said about its tokens (mask, rotary tables,
    packing). Where one is packed, the others are for the core, too. A stream without rotary tables
    has no places.

    Attributes:
        heads: of each stream.
        core: what mixes them; it must be free of order.

    Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv
    2403.03206.
    """

    heads: tuple[Heads, ...]
    core: Core

    def mix(self, tokens: Sequence[Tensor], ctxs: Sequence[Context]) -> list[Tensor | None]:
        """What each stream (B, N, D) gets, (B, N, D); None for one whose heads do not close."""
        works = [
            Work(ctx.ledger, heads.site.path, ctx.complete)
            for heads, ctx in zip(self.heads, ctxs, strict=True)
        ]
        opened = []
        for heads, x, ctx, work in zip(self.heads, tokens, ctxs, works, strict=True):
            one, _ = heads.open(x, ctx, work)
            if ctx.rope is not None and self.core.rotates == "qk":
                one = one._replace(q=ctx.rope.query(one.q), k=ctx.rope.key(one.k))
            opened.append(heads.tapped(heads.share(one), ctx))
        packed = any(ctx.packing is not None for ctx in ctxs)
        outs = (_packed if packed else _mixed)(self.core, opened, ctxs)
        closed: list[Tensor | None] = []
        for heads, out, x, ctx, work in zip(self.heads, outs, tokens, ctxs, works, strict=True):
            closed.append(heads.close(out, x, ctx, work) if heads.closes else None)
            if ctx.ledger is not None and work.executed:
                done = torch.stack(work.executed).sum(0)
                ctx.ledger.work(heads.site.path, done / heads.macs(x.shape[1]))
        return closed

    def report(
        self, ledger: Ledger, tokens: Sequence[Tensor], ctxs: Sequence[Context], share: Tensor
    ) -> None:
        """Write into the ledger that this share (B,) of the heads runs, in every stream; costs are
        those of one sample, or of all in a packed row.
        """
        count = 1 if all(ctx.packing is None for ctx in ctxs) else len(share)
        lengths = [
            (x.shape[1],) * count if ctx.packing is None else ctx.packing.lengths
            for x, ctx in zip(tokens, ctxs, strict=True)
        ]
        for heads, own in zip(self.heads, lengths, strict=True):
            ledger.work(heads.site.path, share, heads.macs(sum(own)))
        core = sum(self.core_macs(sum(both)) for both in zip(*lengths, strict=True))
        ledger.work(self.core.site.path, share, core)

    def core_macs(self, n: int) -> int:
        """Dense multiply-adds of the core on n tokens, those of all streams."""
        heads = self.heads[0]
        return self.core.macs(n, None, heads=heads.heads, head_dim=heads.head_dim)

    @property
    def plain(self) -> bool:
        """All projections are matrices that can be cut."""
        return all(type(layer) is nn.Linear for heads in self.heads for layer in heads.cut)


def _mixed(core: Core, opened: Sequence[Opened], ctxs: Sequence[Context]) -> Sequence[Tensor]:
    """What the core makes of the tokens of each stream, (B, H, N, V)."""
    counts = [one.q.shape[2] for one in opened]
    q, k, v, further = _behind(opened, lambda x, i: x)
    rope = Rope.joined(_turns(core, ctxs), counts, like=q)
    ctx = replace(ctxs[-1], mask=_mask(opened, ctxs), rope=rope, positions=None, grid=None)
    return core(q, k, v, ctx, **further).split(counts, dim=2)


def _packed(core: Core, opened: Sequence[Opened], ctxs: Sequence[Context]) -> list[Tensor]:
    """The same where streams are packed."""
    dense = [ctx.packing is None for ctx in ctxs]
    sizes = [(one.q.shape[0], one.q.shape[2]) for one in opened]
    packings = [
        ctx.packing or Packing.from_mask(one.q.new_ones(size, dtype=torch.bool))
        for ctx, one, size in zip(ctxs, opened, sizes, strict=True)
    ]
    packing, order = Packing.joined(*packings)
    counts = [sum(p.lengths) for p in packings]
    q, k, v, further = _behind(
        opened, lambda x, i: x.transpose(0, 1).flatten(1, 2)[None] if dense[i] else x
    )
    tables = [
        rope.row(size[0]) if rope is not None and flat else rope
        for rope, flat, size in zip(_turns(core, ctxs), dense, sizes, strict=True)
    ]
    rope = Rope.joined(tables, counts, like=q)
    rope = None if rope is None else rope.tokens(order)
    q, k, v = (x.index_select(2, order) for x in (q, k, v))
    further = {name: x.index_select(2, order) for name, x in further.items()}
    ctx = replace(ctxs[-1], packing=packing, rope=rope, positions=None, grid=None)
    out = core.packed(q, k, v, ctx, **further).index_select(2, order.argsort())
    return [
        o[0].unflatten(1, size).transpose(0, 1) if flat else o
        for o, size, flat in zip(out.split(counts, dim=2), sizes, dense, strict=True)
    ]


def _turns(core: Core, ctxs: Sequence[Context]) -> list[Rope | None]:
    """The tables for a core that turns by itself."""
    return [ctx.rope if core.rotates == "inside" else None for ctx in ctxs]


def _behind(opened: Sequence[Opened], row: Callable[[Tensor, int], Tensor]) -> Opened:
    """The streams one behind the other, each as ``row(tensor, stream)``."""

    def cat(pieces: list[Tensor]) -> Tensor:
        return torch.cat([row(x, i) for i, x in enumerate(pieces)], dim=2)

    further = {name: cat([one.further[name] for one in opened]) for name in opened[0].further}
    q, k, v = cat([o.q for o in opened]), cat([o.k for o in opened]), cat([o.v for o in opened])
    return Opened(q, k, v, further)


def _mask(opened: Sequence[Opened], ctxs: Sequence[Context]) -> Tensor | None:
    """The key masks of all streams; one without any is whole."""
    if all(ctx.mask is None for ctx in ctxs):
        return None
    masks = [
        one.q.new_ones(one.q.shape[0], one.q.shape[2], dtype=torch.bool)
        if ctx.mask is None
        else ctx.mask
        for one, ctx in zip(opened, ctxs, strict=True)
    ]
    return torch.cat(masks, dim=1)
