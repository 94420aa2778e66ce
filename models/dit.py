"""DiT: class-conditional diffusion transformer.

Reference: Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effformer.layout import Layout
from effformer.site import NormRule

from .base import register_presets
from .diffusion_parts import DIT_PARAMS, LatentConfig, LatentTransformer, dit_presets
from .layouts.dit import DIFFUSERS, OFFICIAL

__all__ = ["PRESETS", "DiT"]


class DiT(LatentTransformer):
    """Diffusion transformer: patches of a latent, conditioned by time and class through adaLN-Zero.

    ``forward(x, t, y)`` follows the official convention: t counts diffusion steps (0..999), the
    output holds the predicted noise and, with ``learn_sigma``, as many channels of variance logits.

    Args:
        config: the config.
        name: preset name.

    Differs from the paper: other input sizes than ``input_size`` are accepted, with positions
    computed for them; labels are dropped by an explicit mask, never by hidden randomness.

    Reference: Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748.
    """

    FAMILY: ClassVar[str] = "dit"
    CONVENTION: ClassVar[str | None] = "dit"
    STEPS: ClassVar[int | None] = 1000
    LATENT_SCALE: ClassVar[float | None] = 0.18215
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL, DIFFUSERS)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(LatentConfig):
        """Knobs of `DiT`: those of `LatentConfig`."""

    def __init__(self, config: DiT.Config, name: str | None = None) -> None:
        super().__init__(config, name, NormRule(affine=False, ffn_eps=config.ffn_norm_eps))


PRESETS = dit_presets(
    DiT.Config, "dit", "DiT", "arXiv 2212.09748, table 1 and released checkpoints", DIT_PARAMS
)
register_presets(DiT, PRESETS, paper="2212.09748")
