"""LightningDiT: a DiT with the parts of language models, trained as a flow.

Reference: Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models,
2025, arXiv 2501.01423.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from effformer.blocks import Needs, build_stack, head_width
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap
from effformer.ffn import SwiGLU
from effformer.layout import Layout
from effformer.nn.embeddings import LabelEmbedding, TimeEmbedding
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.nn.rope import GridRope
from effformer.site import NormRule

from .base import Model, Preset, register_presets
from .diffusion_parts import (
    FinalLayer,
    LatentConfig,
    check_inputs,
    latent_axes,
    latent_inputs,
    latent_site,
    position_table,
    positions_of,
    reset_parameters,
)
from .layouts.lightningdit import OFFICIAL

__all__ = ["PRESETS", "LightningDiT"]


class LightningDiT(Model):
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
        input_size: int = 16
        channels: int = 32
        patch: int = 1
        learn_sigma: bool = False
        norm: Literal["rms", "layer"] = "rms"
        rope: GridRope.Config | None = GridRope.Config(temperature=10000.0)

        def __post_init__(self) -> None:
            LatentConfig.__post_init__(self)
            if self.rope is not None and self.rope.kind == "mixed":
                raise ValueError("rope: kind 'mixed' differs by layer; use 'axial' or 'centered'")

    def __init__(self, config: LightningDiT.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        self.grid, self.out_channels = config.grid, config.out_channels
        # norms of queries and keys have learned factors in both forms
        rule = NormRule(
            kind=config.norm, modulated_affine=config.norm == "rms", ffn_eps=config.ffn_norm_eps
        )
        site = latent_site(config, rule)
        width = None if config.rope is None else head_width(config)
        needs = Needs(cond=True, time=True, axes="hw", rope=width)
        self.patch_embed = PatchEmbed(config.channels, config.dim, config.patch)
        self.pos_embed = position_table(config)
        self.time_embed = TimeEmbedding(config.dim, freq_shift=config.time_freq_shift)
        self.label_embed = LabelEmbedding(
            config.num_classes, config.dim, null=config.label_dropout > 0
        )
        self.blocks = build_stack(config, site, needs, name=self.name)
        self.final = FinalLayer(site, config.patch, self.out_channels)
        reset_parameters(self, self.patch_embed, self.time_embed, self.label_embed, self.final)
        if config.rope is not None and width is not None:
            self.rope = GridRope(config.rope, width, heads=config.heads, depth=config.depth)

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
        """Predict the velocity.

        Args:
            x: (B, C, H, W) latents, H and W divisible by the patch.
            t: (B,) time in [0, 1].
            y: (B,) class ids, int64.
            drop: (B,) bool, labels to replace by the null class.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, C, H, W).

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
        grid = self.config.cells(x)
        positions, rope = None, None
        if self.config.rope is not None:
            positions = self.rope.positions(grid, device=x.device)
            (rope,) = self.rope(positions, like=x)
        return Context(
            cond=cond, time=time, grid=grid, positions=positions, rope=rope,
            ledger=ledger, tap=tap, complete=complete,
        )  # fmt: skip

    def embed(self, x: Tensor) -> Tensor:
        """Patches of x (B, C, H, W) with positions: the tokens (B, N, D) of the first block."""
        cells = self.config.cells(x)
        tokens: Tensor = self.patch_embed(x) + positions_of(self.pos_embed, cells, self.config)
        return tokens

    def head(self, h: Tensor, ctx: Context) -> Tensor:
        """The velocity (B, C, H, W) from the tokens behind the last block."""
        assert ctx.grid is not None
        height, width = ctx.grid
        out = unpatchify(self.final(h, ctx.cond), height, width, self.config.patch)
        return out[:, : self.config.channels]

    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        like = self.patch_embed.proj.weight
        return latent_inputs(self.config, like, batch, generator=generator)

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return latent_axes(self.config)


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
