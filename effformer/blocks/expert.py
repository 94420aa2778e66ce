"""Two streams of tokens that are one row to all but the modulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from effformer import registry
from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.context import EMPTY, Context, Rope
from effformer.registry import Caps, block
from effformer.site import Site

from .base import Block, ffn_branches, mixer_branches

__all__ = ["ExpertAdaLN"]


@block.register(
    "expert-adaln",
    caps=Caps(cond="optional", sequential=True, mixer_only=True, joint=True),
    paper="2408.06072",
)
class ExpertAdaLN(Block):
    """Pre-norm block of two streams with one set of weights: norms, token mixer and FFN work on the row
    [y | x], and only shifts, scales and gates differ between the two (CogVideoX).

    ``block(x, y, ctx, y_ctx) -> (x, y)``: x is the stream that the model returns (a video), y the one
    that goes with it (a text). Masks and rotary tables of each stand in its own `Context`; a stream
    without rotary tables has no places. What both share (``cond``, ``time``, ``ledger``, ``tap``,
    ``complete``) stands in both.

    Args:
        config: the knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the position-wise network, None for none.

    Raises:
        ValueError: at call, a context without the conditioning.
        CapabilityError: at call, a context field that the mixer cannot honour, or that two streams
            cannot.

    Reference: CogVideoX: Text-to-Video Diffusion Models with An Expert Transformer, 2024, arXiv
    2408.06072.
    """

    ROLES: ClassVar[Mapping[str, str]] = {**Block.ROLES, "y_modulation": "adaln_blocks"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """`ExpertAdaLN` has no knobs of its own."""

    def __init__(
        self, config: ExpertAdaLN.Config, site: Site, *, attn: BaseConfig, ffn: BaseConfig | None
    ) -> None:
        super().__init__(mixer_branches(attn, None, site) | ffn_branches(ffn, site), site)
        if site.cond_dim is not None:
            self.y_modulation = self.modulate_by(site.cond_dim, len(self.order))

    def forward(  # type: ignore[override]
        self, x: Tensor, y: Tensor, ctx: Context = EMPTY, y_ctx: Context = EMPTY
    ) -> tuple[Tensor, Tensor]:
        """(B, N, D) and (B, M, D) -> the same."""
        counts = [y.shape[1], x.shape[1]]
        row, mods = self._row((y, x), (y_ctx, ctx)), None
        if self.site.cond_dim is not None:
            own = self.modulations(ctx)
            if y_ctx.cond is None:
                raise ValueError(
                    f"{self.site.path or 'block'}: y_ctx.cond is None, but the block is modulated"
                )
            mods = tuple(
                torch.cat([m.expand(-1, n, -1) for m, n in zip(pair, counts, strict=True)], dim=1)
                for pair in zip(self.y_modulation(y_ctx.cond), own, strict=True)
            )
        y, x = self.walk(torch.cat([y, x], dim=1), row, mods).split(counts, dim=1)
        return x, y

    def _row(self, tokens: tuple[Tensor, Tensor], ctxs: tuple[Context, Context]) -> Context:
        """The context of both streams as one row."""
        where = self.site.path or "expert-adaln"
        for c in ctxs:
            for name in ("merging", "stream"):
                if getattr(c, name) is not None:
                    raise CapabilityError(f"{where}: two streams do not take ctx.{name}")
            if c.packing is not None:
                able = ", ".join(registry.block.names(joint=True, packed=True))
                raise CapabilityError(
                    f"{where}: this block cannot honour packed=True; choices that can: {able}"
                )
            if c.mask is not None and c.mask.dim() != 2:
                raise CapabilityError(
                    f"{where}: a stream takes a key mask (B, N), got {tuple(c.mask.shape)}"
                )
        counts, mask, rope = [t.shape[1] for t in tokens], None, None
        if any(c.mask is not None for c in ctxs):
            whole = [t.new_ones(t.shape[:2], dtype=torch.bool) for t in tokens]
            masks = [w if c.mask is None else c.mask for c, w in zip(ctxs, whole, strict=True)]
            mask = torch.cat(masks, dim=1)
        turned = next((c.rope for c in ctxs if c.rope is not None), None)
        if turned is not None:
            rope = Rope.joined([c.rope for c in ctxs], counts, like=turned.cos)
        return replace(ctxs[1], mask=mask, rope=rope, positions=None, grid=None)

    def macs(
        self, n: int, m: int | tuple[int, ...] | None = None, *, grid: tuple[int, ...] | None = None
    ) -> int:
        """Dense multiply-adds of one sample with n tokens in x and m in y (None: n)."""
        assert not isinstance(m, tuple)
        own = 0 if self.site.cond_dim is None else self.y_modulation.macs()
        return super().macs(n + (n if m is None else m)) + own
