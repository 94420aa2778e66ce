"""DiT-DH: a deep encoder that conditions every token of a wide and shallow head.

Reference: RecTok: Reconstruction Distillation along Rectified Flow, 2025, arXiv 2512.13421; Diffusion
Transformers with Representation Autoencoders, 2025, arXiv 2510.11690 (the wide head); DDT: Decoupled
Diffusion Transformer, 2025, arXiv 2504.05741.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.blocks import Needs, build_stack, head_width
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import EMPTY, Context, Ledger, Tap, explained
from effformer.ffn import SwiGLU
from effformer.layout import Layout
from effformer.nn.embeddings import LabelEmbedding
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.nn.precision import widened
from effformer.nn.rope import GridRope
from effformer.site import NormRule
from effformer.values import Count, Natural

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
from .layouts.ditdh import OFFICIAL

__all__ = ["PRESETS", "DiTDH", "FourierTime"]


class DiTDH(Model):
    """`LightningDiT` in two widths: an encoder makes a vector for every token of a noisy latent, and a
    head of a few wide blocks, modulated by these, makes the velocity of the same latent.

    ``forward(x, t, y)`` returns the velocity (B, C, H, W); t = 0 is noise, t = 1 data (`FlowConvention`
    "lightningdit"). `encode` and `velocity` are its two steps: what the encoder made may serve
    several evaluations of the head.

    Latents of many channels want more noise: train and sample along times shifted by ``a = sqrt(numbers
    in a latent / 4096)``, 2.83 for 16 x 16 x 128: ``time=Shifted(...)``,
    ``TimeGrid.uniform(49).shifted(a)``. Latents are normalised, channel by channel.

    Args:
        config: the config.
        name: preset name.

    Differs from the paper: its code shifts away from noise where a < 1; here a shift is what you
    say.

    Reference: RecTok: Reconstruction Distillation along Rectified Flow, 2025, arXiv 2512.13421.
    """

    FAMILY: ClassVar[str] = "ditdh"
    CONVENTION: ClassVar[str | None] = "lightningdit"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL,)
    ROLES: ClassVar[Mapping[str, str]] = {"wide_embed": "patch_embed", "to_wide": "adaln_blocks"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(LatentConfig):
        """Knobs of `DiTDH`, beside `LatentConfig`.

        Attributes:
            dim: width of the encoder.
            depth: number of blocks of encoder and head, which ``layers`` counts through.
            heads: number of heads of the encoder.
            wide_depth: how many of the blocks, the last ones, are the head's.
            wide_dim: width of these.
            wide_heads: number of their heads.
            rope: rotary tables for every attention, or None.
        """

        ffn: BaseConfig | None = part("ffn", SwiGLU.Config())
        input_size: Count | tuple[Count, Count] = 16
        channels: Count = 128
        patch: Count = 1
        learn_sigma: Literal[False] = False
        time_freq_shift: Literal[0] = 0
        wide_depth: Natural = 2
        wide_dim: Count = 2048
        wide_heads: Count = 16
        rope: GridRope.Config | None = GridRope.Config(temperature=10000.0)

        def check(self) -> None:
            LatentConfig.check(self)
            if self.wide_depth > self.depth:
                raise ValueError(
                    f"wide_depth={self.wide_depth} blocks are more than all, depth={self.depth}"
                )
            if self.rope is not None and self.rope.kind == "mixed":
                raise ValueError("rope: kind 'mixed' differs by layer; use 'axial' or 'centered'")

        @property
        def wide(self) -> DiTDH.Config:
            """The same with the width and the heads of the head."""
            return replace(self, dim=self.wide_dim, heads=self.wide_heads)

    def __init__(self, config: DiTDH.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        rule = NormRule(kind="rms", modulated_affine=True, ffn_eps=config.ffn_norm_eps)
        here, wide = latent_site(config, rule), latent_site(config.wide, rule)
        wide = replace(wide, time_dim=config.dim)
        first = config.depth - config.wide_depth
        rope, needs = config.rope, [Needs(), Needs()]
        if rope is not None:
            widths = head_width(config), head_width(config.wide)
            needs = [Needs(rope=width) for width in widths]
            self.rope, self.wide_rope = (
                GridRope(rope, width, heads=site.heads, depth=config.depth)
                for width, site in zip(widths, (here, wide), strict=True)
            )
        self.patch_embed = PatchEmbed(config.channels, config.dim, config.patch)
        self.wide_embed = PatchEmbed(config.channels, config.wide_dim, config.patch)
        self.pos_embed = position_table(config)
        self.time_embed = FourierTime(config.dim)
        self.label_embed = LabelEmbedding(
            config.num_classes, config.dim, null=config.label_dropout > 0
        )
        self.blocks = build_stack(
            config,
            [here] * first + [wide] * config.wide_depth,
            needs[:1] * first + needs[1:] * config.wide_depth,
            name=self.name,
        )
        self.to_wide = nn.Linear(config.dim, config.wide_dim)
        self.final = FinalLayer(wide, config.patch, config.channels)
        labels, time = self.label_embed, self.time_embed
        reset_parameters(self, self.patch_embed, self.final, labels.table, time.fc1, time.fc2)

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
            t: (B,) time in [0, 1], 0 = noise.
            y: (B,) class ids, int64.
            drop: (B,) bool, labels to replace by the null class.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: a shape does not fit.
            TypeError: labels are not integers.
        """
        ctx = Context(ledger=ledger, tap=tap, complete=complete)
        return self.velocity(x, t, self.encode(x, t, y, drop=drop, ctx=ctx), ctx=ctx)

    def encode(
        self, x: Tensor, t: Tensor, y: Tensor, *, drop: Tensor | None = None, ctx: Context = EMPTY
    ) -> Tensor:
        """Vectors (B, N, wide_dim) that modulate the head, one for each token; see `forward`."""
        check_inputs(self.config, x, t, y, where=self.name)
        time = self.time_embed(t, x.dtype)
        cond = F.silu(time + self.label_embed(y, drop))
        h = self.patch_embed(x)
        h = h + positions_of(self.pos_embed, self.config.cells(x), self.config)
        ctx = self._context(x, replace(ctx, cond=cond, time=time), "rope")
        for block in self.blocks[: self.config.depth - self.config.wide_depth]:
            h = block(h, ctx)
        return self.to_wide(F.silu(time[:, None] + h))

    def velocity(self, x: Tensor, t: Tensor, each: Tensor, *, ctx: Context = EMPTY) -> Tensor:
        """The velocity (B, C, H, W) at x, from what `encode` made at x or nearby."""
        time = self.time_embed(t, x.dtype)
        ctx = self._context(x, replace(ctx, cond=each, time=time), "wide_rope")
        h = self.wide_embed(x)
        for block in self.blocks[self.config.depth - self.config.wide_depth :]:
            h = block(h, ctx)
        height, width = self.config.cells(x)
        return unpatchify(self.final(h, each), height, width, self.config.patch)

    def _context(self, x: Tensor, ctx: Context, tables: str) -> Context:
        """With the places of the tokens."""
        grid = self.config.cells(x)
        if self.config.rope is None:
            return replace(ctx, grid=grid)
        rope: GridRope = getattr(self, tables)
        positions = rope.positions(grid, device=x.device)
        (turns,) = rope(positions, like=x)
        return replace(ctx, grid=grid, positions=positions, rope=turns)

    def assumed(self) -> Mapping[str, Any] | None:
        return {"convention": self.CONVENTION, "null": self.config.label_dropout > 0}

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        like = self.patch_embed.proj.weight
        return latent_inputs(self.config, like, batch, generator=generator)

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return latent_axes(self.config, self.pos_embed)


class FourierTime(nn.Module):
    """``W2 silu(W1 [sin(2 pi t f), cos(2 pi t f)] + b1) + b2`` with frequencies f that are drawn once
    from a normal distribution, and kept.

    Args:
        dim: output width.
        frequencies: number of them.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"": "t_mlp"}

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(frequencies), requires_grad=False)
        self.fc1 = nn.Linear(2 * frequencies, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map t (B,) to (B, D) of ``dtype`` (that of the weights); features are never half.

        Raises:
            TypeError: complex times.
        """
        if t.is_complex():
            raise TypeError(f"times t must be real numbers, got {t.dtype}")
        angles = 2 * math.pi * widened(t)[:, None] * widened(self.frequencies)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)
        out: Tensor = self.fc2(F.silu(self.fc1(waves)))
        return out


_SIZES = {
    "s": (384, 12, 6, 193_587_924),
    "b": (768, 12, 12, 291_182_292),
    "l": (1024, 24, 16, 618_466_996),
    "xl": (1152, 28, 16, 835_316_436),
}
_SHIFT = math.sqrt(16 * 16 * 128 / 4096)
PRESETS = {
    **{
        f"ditdh-{size}": Preset(
            config=DiTDH.Config(dim=dim, depth=depth + 2, heads=heads),
            params=params,
            source="released code of RecTok (Shi-qingyu/RecTok)",
            sampling={"steps": 149, "shift": _SHIFT},
            aliases=(f"DiTDH-{size.upper()}",),
        )
        for size, (dim, depth, heads, params) in _SIZES.items()
    },
    "ditdh-nano": Preset(
        config=DiTDH.Config(
            dim=48, depth=3, heads=2, wide_depth=1, wide_dim=96, wide_heads=2, input_size=8, channels=4,
        ),
        summary="A size of ours for tests and examples.",
    ),
}  # fmt: skip
register_presets(DiTDH, PRESETS, paper="2512.13421")
