"""DyDiT: the DiT network with dynamic width and dynamic tokens in every block.

Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456; DyDiT++: Dynamic Diffusion
Transformers for Efficient Visual Generation, 2025, arXiv 2504.06803.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effformer.blocks import DynamicTokens, DynamicWidth
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.layout import Layout
from effformer.site import NormRule

from .base import register_presets
from .diffusion_parts import LatentConfig, LatentTransformer, dit_presets
from .layouts.dit import DIFFUSERS, OFFICIAL

__all__ = ["PRESETS", "DyDiT"]


class DyDiT(LatentTransformer):
    """Dynamic diffusion transformer: `DiT` whose blocks switch heads, channels and tokens off.

    ``build_model("dydit-b")`` means the same as ``build_model("dit-b", width="dynamic",
    tokens="dynamic")``; the same two options make a dynamic `SiT`, whose gates read the embedding
    of continuous time. Weights of a DiT load into it, with gates that start open: it then computes
    what the DiT computes, and is trained from there (`effformer.compress.Frugal`).

    Args:
        config: the config.
        name: preset name.

    Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456.
    """

    FAMILY: ClassVar[str] = "dydit"
    CONVENTION: ClassVar[str | None] = "dit"
    STEPS: ClassVar[int | None] = 1000
    LATENT_SCALE: ClassVar[float | None] = 0.18215
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL, DIFFUSERS)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(LatentConfig):
        """Knobs of `DyDiT`: those of `LatentConfig`, with both slots filled."""

        width: BaseConfig | None = part("width", DynamicWidth.Config())
        tokens: BaseConfig | None = part("tokens", DynamicTokens.Config())

    def __init__(self, config: DyDiT.Config, name: str | None = None) -> None:
        super().__init__(config, name, NormRule(affine=False, ffn_eps=config.ffn_norm_eps))


_PARAMS = {
    "s-2": 33_120_740, "s-4": 33_102_404, "s-8": 33_305_540,
    "b-2": 131_158_964, "b-4": 131_122_196, "b-8": 131_528_084,
    "l-2": 460_416_776, "l-4": 460_367_720, "l-8": 460_908_776,
    "xl-2": 678_424_644, "xl-4": 678_369_444, "xl-8": 678_978_084,
}  # fmt: skip
"""Those of XL/2 are the released model's."""

PRESETS = dit_presets(
    DyDiT.Config,
    "dydit",
    "DyDiT",
    "arXiv 2410.03456 (S, B and XL with patch 2), sizes of DiT",
    _PARAMS,
)
register_presets(DyDiT, PRESETS, paper="2410.03456")
