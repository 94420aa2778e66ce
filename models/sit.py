"""SiT: the DiT network under rectified flow and other interpolants.

Reference: SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers, 2024, arXiv 2401.08740.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from effformer.context import Context
from effformer.layout import Layout
from effformer.site import NormRule

from .base import register_presets
from .diffusion_parts import DIT_PARAMS, LatentConfig, LatentTransformer, dit_presets
from .layouts.dit import DIFFUSERS, SIT_OFFICIAL

__all__ = ["PRESETS", "SiT"]


class SiT(LatentTransformer):
    """Scalable interpolant transformer: `DiT` with time in [0, 1] (0 noise, 1 data) and the
    velocity as output: ``forward(x, t, y)`` with t in [0, 1] returns (B, C, H, W).

    Args:
        config: the config.
        name: preset name.

    Reference: SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
    Transformers, 2024, arXiv 2401.08740.
    """

    FAMILY: ClassVar[str] = "sit"
    CONVENTION: ClassVar[str | None] = "sit"
    LATENT_SCALE: ClassVar[float | None] = 0.18215
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (SIT_OFFICIAL, DIFFUSERS)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(LatentConfig):
        """Knobs of `SiT`: those of `LatentConfig`.

        With ``learn_sigma``, as in the released weights, the second half of the output channels is
        thrown away.
        """

    def __init__(self, config: SiT.Config, name: str | None = None) -> None:
        super().__init__(config, name, NormRule(affine=False, ffn_eps=config.ffn_norm_eps))

    def head(self, h: Tensor, ctx: Context) -> Tensor:
        """The velocity (B, C, H, W) from the tokens behind the last block."""
        return super().head(h, ctx)[:, : self.config.channels]


PRESETS = dit_presets(SiT.Config, "sit", "SiT", "arXiv 2401.08740, same sizes as DiT", DIT_PARAMS)
register_presets(SiT, PRESETS, paper="2401.08740")
