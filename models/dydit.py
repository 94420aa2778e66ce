"""DyDiT: the DiT network with dynamic width and dynamic tokens in every block.

Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456; DyDiT++: Dynamic Diffusion
Transformers for Efficient Visual Generation, 2025, arXiv 2504.06803.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effformer.blocks import DynamicTokens, DynamicWidth, Needs, build_stack
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap
from effformer.layout import Layout
from effformer.nn.embeddings import LabelEmbedding, TimeEmbedding
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.site import NormRule

from .base import Model, register_presets
from .diffusion_parts import (
    FinalLayer,
    LatentConfig,
    check_inputs,
    dit_presets,
    latent_axes,
    latent_inputs,
    latent_site,
    position_table,
    positions_of,
    reset_parameters,
)
from .layouts.dit import DIFFUSERS, OFFICIAL

__all__ = ["PRESETS", "DyDiT"]


class DyDiT(Model):
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
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL, DIFFUSERS)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(LatentConfig):
        """Knobs of `DyDiT`: those of `LatentConfig`, with both slots filled."""

        width: BaseConfig | None = part("width", DynamicWidth.Config())
        tokens: BaseConfig | None = part("tokens", DynamicTokens.Config())

    def __init__(self, config: DyDiT.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        self.grid, self.out_channels = config.grid, config.out_channels
        site = latent_site(config, NormRule(affine=False, ffn_eps=config.ffn_norm_eps))
        needs = Needs(cond=True, time=True, axes="hw")
        self.patch_embed = PatchEmbed(config.channels, config.dim, config.patch)
        self.pos_embed = position_table(config)
        self.time_embed = TimeEmbedding(config.dim, freq_shift=config.time_freq_shift)
        self.label_embed = LabelEmbedding(
            config.num_classes, config.dim, null=config.label_dropout > 0
        )
        self.blocks = build_stack(config, site, needs, name=self.name)
        self.final = FinalLayer(site, config.patch, self.out_channels)
        reset_parameters(self, self.patch_embed, self.time_embed, self.label_embed, self.final)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        drop: Tensor | None = None,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict noise (and variance logits).

        Args:
            x: (B, C, H, W) latents, H and W divisible by the patch.
            t: (B,) time, counted in diffusion steps.
            y: (B,) class ids, int64.
            drop: (B,) bool, labels to replace by the null class.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, C, H, W), or (B, 2 C, H, W) with ``learn_sigma``.

        Raises:
            ValueError: a shape does not fit.
            TypeError: labels are not integers.
        """
        ctx = self.context(x, t, y, drop=drop, ledger=ledger, tap=tap, complete=complete)
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, ctx)
        return self.head(h, ctx)

    def context(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        drop: Tensor | None = None,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Context:
        """Check the inputs and make what the blocks get beside the tokens; see `forward`."""
        check_inputs(self.config, x, t, y, where=self.name)
        time = self.time_embed(t, x.dtype)
        cond = time + self.label_embed(y, drop)
        return Context(
            cond=cond, time=time, grid=self.config.cells(x),
            ledger=ledger, tap=tap, complete=complete,
        )  # fmt: skip

    def embed(self, x: Tensor) -> Tensor:
        """Patches of x (B, C, H, W) with positions: the tokens (B, N, D) of the first block."""
        cells = self.config.cells(x)
        tokens: Tensor = self.patch_embed(x) + positions_of(self.pos_embed, cells, self.config)
        return tokens

    def head(self, h: Tensor, ctx: Context) -> Tensor:
        """The output of the model from the tokens (B, N, D) behind the last block."""
        assert ctx.grid is not None
        height, width = ctx.grid
        return unpatchify(self.final(h, ctx.cond), height, width, self.config.patch)

    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        like = self.patch_embed.proj.weight
        return latent_inputs(self.config, like, batch, steps=1000, generator=generator)

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return latent_axes(self.config)


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
