"""LightningDiT: a DiT with the parts of language models, trained as a flow.

Reference: Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models,
2025, arXiv 2501.01423.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from effformer.blocks import head_width
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Rope
from effformer.ffn import SwiGLU
from effformer.layout import Layout
from effformer.nn.rope import GridRope
from effformer.site import NormRule
from effformer.values import Count

from .base import Preset, register_presets
from .diffusion_parts import LatentConfig, LatentTransformer
from .layouts.lightningdit import OFFICIAL

__all__ = ["PRESETS", "LightningDiT"]


class LightningDiT(LatentTransformer):
    """`SiT` with SwiGLU, RMSNorm with learned factors and axial rotary positions (beside the fixed
    sin-cos ones), on the patches of a VA-VAE latent (16 x 16 x 32, patch 1).

    ``forward(x, t, y)`` returns the velocity (B, C, H, W); t = 0 is noise, t = 1 data, and the
    network is told t as it is (`FlowConvention` "lightningdit"). The official options are
    ``ffn="mlp"`` (no SwiGLU), ``rope=None``, ``norm="layer"``, ``attn={"qk_norm": True}``,
    ``block={"name": "adaln-zero", "shift": False}`` and ``learn_sigma``.

    Training: ``FlowMatching.Config(cosine=1.0, time="logit-normal")``. The published samples guide
    the first 3 channels from t = 0.11 on: ``guided(model, 10.0, null={"y": 1000}, channels=3,
    interval=(0.11, 1.0))``.

    Args:
        config: the config.
        name: preset name.

    Differs from the paper: as `DiT` does; other grids count cells as the trained one does.

    Reference: Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion
    Models, 2025, arXiv 2501.01423.
    """

    FAMILY: ClassVar[str] = "lightningdit"
    CONVENTION: ClassVar[str | None] = "lightningdit"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(LatentConfig):
        """Knobs of `LightningDiT`, beside `LatentConfig`.

        Attributes:
            norm: "rms" (with learned factors) or "layer" (without, as in DiT).
            rope: rotary tables for every attention, or None.
        """

        ffn: BaseConfig = part("ffn", SwiGLU.Config())
        input_size: Count | tuple[Count, Count] = 16
        channels: Count = 32
        patch: Count = 1
        learn_sigma: bool = False
        norm: Literal["rms", "layer"] = "rms"
        rope: GridRope.Config | None = GridRope.Config(temperature=10000.0)

        def check(self) -> None:
            if self.rope is not None and self.rope.kind == "mixed":
                raise ValueError("rope: kind 'mixed' differs by layer; use 'axial' or 'centered'")

    def __init__(self, config: LightningDiT.Config, name: str | None = None) -> None:
        # norms of queries and keys have learned factors in both forms
        rule = NormRule(
            kind=config.norm, modulated_affine=config.norm == "rms", ffn_eps=config.ffn_norm_eps
        )
        width = None if config.rope is None else head_width(config)
        super().__init__(config, name, rule, rope=width)
        if config.rope is not None and width is not None:
            self.rope = GridRope(config.rope, width, heads=config.heads, depth=config.depth)

    def places(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor | None, Rope | None]:
        if self.config.rope is None:
            return None, None
        positions: Tensor = self.rope.positions(grid, device=like.device)
        (rope,) = self.rope(positions, like=like)
        return positions, rope

    def head(self, h: Tensor, ctx: Context) -> Tensor:
        """The velocity (B, C, H, W) from the tokens behind the last block."""
        return super().head(h, ctx)[:, : self.config.channels]


_SIZES = {
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1152, 28, 16),
    "1p0b": (1536, 24, 24),
    "1p6b": (1792, 28, 28),
}
_OURS = "A size of ours for tests and examples."
_TINY = LightningDiT.Config(dim=48, depth=2, heads=2, input_size=8, channels=4)


def _presets() -> dict[str, Preset]:
    presets = {}
    for size, (dim, depth, heads) in _SIZES.items():
        for patch in (1, 2):
            short = (f"lightningdit-{size}",) if patch == 1 else ()
            presets[f"lightningdit-{size}-{patch}"] = Preset(
                config=LightningDiT.Config(dim=dim, depth=depth, heads=heads, patch=patch),
                source="released code of arXiv 2501.01423",
                aliases=(*short, f"LightningDiT-{size.upper()}/{patch}"),
            )
    return presets | {"lightningdit-nano": Preset(config=_TINY, summary=_OURS)}


PRESETS = _presets()
register_presets(LightningDiT, PRESETS, paper="2501.01423")
