"""DiT: class-conditional diffusion transformer.

Reference: Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effformer.blocks import Needs, build_stack
from effformer.context import Context, Ledger, Tap
from effformer.layout import Layout
from effformer.nn.embeddings import LabelEmbedding, TimeEmbedding
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.site import NormRule

from .base import Model, register_presets
from .diffusion_parts import (
    DIT_PARAMS,
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

__all__ = ["PRESETS", "DiT"]


class DiT(Model):
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
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL, DIFFUSERS)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(LatentConfig):
        """Knobs of `DiT`: those of `LatentConfig`."""

    def __init__(self, config: DiT.Config, name: str | None = None) -> None:
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


PRESETS = dit_presets(
    DiT.Config, "dit", "DiT", "arXiv 2212.09748, table 1 and released checkpoints", DIT_PARAMS
)
register_presets(DiT, PRESETS, paper="2212.09748")
