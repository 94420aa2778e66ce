"""Conditioned blocks: that of DiT, and that of PixArt, SANA and Wan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effformer.attention import Mixer
from effformer.config import Config as BaseConfig
from effformer.context import Context
from effformer.ffn import FFN
from effformer.nn.norms import SharedModulation, make_norm
from effformer.registry import Caps, block
from effformer.site import Site

from .base import Block, Branch, cross_branches, ffn_branches, mixer_branches
from .prenorm import PreNorm

__all__ = ["AdaLNSingle", "AdaLNZero"]

_PLAIN = PreNorm.Config()


@block.register(
    "adaln-zero",
    caps=Caps(sequential=True, packed=True, cond="always", mixer_only=True),
    paper="2212.09748",
)
class AdaLNZero(PreNorm):
    """Pre-norm block whose branches are shifted, scaled and gated by the conditioning (adaLN-Zero).

    ``x + gate * attn(norm(x) * (1 + scale) + shift)``, the same for the FFN; the six vectors are
    ``Linear(silu(cond))``, zero at initialisation, so that the block starts as the identity.

    Args:
        config: the knobs.
        site: the place in the model; ``site.cond_dim`` is required.
        attn: config of the token mixer.
        ffn: config of the position-wise network, None for none.

    Reference: Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `AdaLNZero`.

        Attributes:
            shift: False leaves the shifts out, ``x + gate * attn(norm(x) * (1 + scale))``: four
                vectors instead of six (LightningDiT's ``wo_shift``).
        """

        shift: bool = True

    def __init__(
        self, config: AdaLNZero.Config, site: Site, *, attn: BaseConfig, ffn: BaseConfig | None
    ) -> None:
        super().__init__(_PLAIN, site, attn=attn, ffn=ffn, shift=config.shift)


class _Plain(Branch):
    """``x + part(x)``, or ``x + part(norm(x))``: no modulation in a block whose other branches have one,
    so that a norm has factors of its own.
    """

    def __init__(
        self, part: Mixer | FFN, site: Site, *, normed: bool, memory: tuple[int, int] = (0, 1)
    ) -> None:
        super().__init__(part, site, normed=False, memory=memory)
        if normed:
            self.norm = make_norm(site)

    def enter(self, x: Tensor, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        return super().enter(x)

    def leave(self, x: Tensor, h: Tensor, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        return super().leave(x, h)


@block.register(
    "adaln-single",
    caps=Caps(sequential=True, cross=True, packed=True, cond="always", mixer_only=True),
    paper="2310.00426",
)
class AdaLNSingle(Block):
    """Block of PixArt, SANA and Wan: token mixer and FFN are shifted, scaled and gated by vectors that the
    model makes once for all blocks, plus a table of the block's own (adaLN-single).

    ``x + gate * attn(norm(x) * (1 + scale) + shift)``, then ``x + cross(x, memory)`` without modulation
    (Wan: ``x + cross(norm(x), memory)``), then as the first with the FFN; the vectors are ``table +
    cond``.

    Args:
        config: the knobs.
        site: the place in the model; ``site.cond_dim`` is that of all vectors together,
            three for each of the modulated branches. In a model with a conditioning vector of another
            width the block makes the vectors itself, as "adaln-zero" does.
        attn: config of the token mixer.
        ffn: config of the position-wise network, None for none.
        cross: config of the mixer that attends to a memory, None for no such branch.

    Reference: PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image
    Synthesis, 2023, arXiv 2310.00426; Wan: Open and Advanced Large-Scale Video Generative Models, 2025,
    arXiv 2503.20314 (``cross_norm``).
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `AdaLNSingle`.

        Attributes:
            cross_norm: a norm stands before the branch over the memory.
        """

        cross_norm: bool = False

    def __init__(
        self,
        config: AdaLNSingle.Config,
        site: Site,
        *,
        attn: BaseConfig,
        ffn: BaseConfig | None,
        cross: BaseConfig | None = None,
    ) -> None:
        branches = mixer_branches(attn, None, site)
        branches |= cross_branches(cross, site, kind=_Plain, normed=config.cross_norm)
        super().__init__(branches | ffn_branches(ffn, site), site)

    def modulate_by(self, cond_dim: int, branches: int) -> SharedModulation:
        modulated = branches - len(self._over_memories)
        return SharedModulation(cond_dim, self.site.dim, 3 * modulated)

    def modulations(self, ctx: Context) -> tuple[Tensor, ...]:
        """As `Block.modulations`; branches over memories, which read none, have those before them."""
        mods = super().modulations(ctx)
        return mods[:3] * len(self._over_memories) + mods

    @property
    def _over_memories(self) -> list[str]:
        return [name for name in self.order if getattr(self, name).far]
