"""The ordinary pre-norm block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from effformer.config import Config as BaseConfig
from effformer.registry import Caps, block
from effformer.site import Site

from .base import Block, ffn_branches, mixer_branches

__all__ = ["PreNorm"]


@block.register(
    "prenorm",
    caps=Caps(sequential=True, cross=True, packed=True, mixer_only=True),
    paper="2002.04745",
)
class PreNorm(Block):
    """Pre-norm block: ``x + attn(norm(x))``, then ``x + ffn(norm(x))``.

    In a decoder ``x + cross(norm(x), memory)`` stands between the two.

    Args:
        config: the knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the position-wise network, None for none.
        cross: config of the mixer that attends to a memory of width ``site.memory_dim``, None for
            no such branch.
        shift: the modulation of a conditioned model shifts.

    Reference: On Layer Normalization in the Transformer Architecture, 2020, arXiv 2002.04745.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `PreNorm`.

        Attributes:
            scale_attn: the layer scale of a model that has one applies to token mixers.
            scale_ffn: it applies to FFNs.
        """

        scale_attn: bool = True
        scale_ffn: bool = True

    def __init__(
        self,
        config: PreNorm.Config,
        site: Site,
        *,
        attn: BaseConfig,
        ffn: BaseConfig | None,
        cross: BaseConfig | None = None,
        shift: bool = True,
    ) -> None:
        branches = mixer_branches(attn, cross, _scaled(site, config.scale_attn))
        branches |= ffn_branches(ffn, _scaled(site, config.scale_ffn))
        super().__init__(branches, site, shift=shift)


def _scaled(site: Site, scale: bool) -> Site:
    """The site of branches with or without the layer scale of the model."""
    return site if scale or site.layer_scale is None else replace(site, layer_scale=None)
