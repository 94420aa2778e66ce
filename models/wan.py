"""Wan: text to video with attention over space and time.

Reference: Wan: Open and Advanced Large-Scale Video Generative Models, 2025, arXiv 2503.20314.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.attention import Attention
from effformer.blocks import AdaLNSingle, BackboneConfig, Needs, build_stack, head_width
from effformer.checks import CapabilityError, check_mask, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap, explained
from effformer.ffn import MLP
from effformer.layout import Layout
from effformer.nn.embeddings import TimeEmbedding
from effformer.nn.norms import SharedModulation
from effformer.nn.patch import PatchEmbed, unpatchify_video
from effformer.nn.rope import GridRope
from effformer.site import NormRule, Site
from effformer.values import Count, Natural

from .base import Model, Preset, register_presets
from .diffusion_parts import FinalLayer, reset_parameters
from .layouts.wan import DIFFUSERS, OFFICIAL

__all__ = ["PRESETS", "Wan"]


class Wan(Model):
    """Text-to-video transformer: patches of a latent in three dimensions with rotary positions (frame,
    row, column), attention over all of them, cross-attention to the text. All blocks share the vectors
    that modulate them (adaLN-single).

    ``forward(x, t, text)`` returns the velocity (B, C, T, H, W) as SD3 writes it (`FlowConvention`
    "sd3"): t = 0 is data, t = 1000 noise, and the velocity points to the noise. ``text`` are features
    of umT5-XXL; the weights were trained on 512 of them, zeros behind those of the words, and no mask.
    A latent frame stands for four of the video, the first one for one. ``axes="st"`` factorizes the
    attention: odd blocks mix within frames, even ones along time.

    Wan2.2 14B are two networks of this size, one for early and one for late times. For images as a
    beginning they read further channels of the latent's size: ``condition`` holds the mask (4
    channels) and the latent of the given frames (16).

    Args:
        config: the config.
        name: preset name.

    Raises:
        ValueError: the widths of the rotary tables are not those of the heads.
        CapabilityError: a part cannot do what its block needs; parts that can are named.

    Differs from the paper: a key mask of the text is honoured; angles are computed in float32.
    Wan2.1's networks for images as a beginning, whose cross-attention reads keys and values of an image
    beside those of the text, and a time of its own for each token (Wan2.2 5B with an image) are not
    built.

    Reference: Wan: Open and Advanced Large-Scale Video Generative Models, 2025, arXiv 2503.20314.
    """

    FAMILY: ClassVar[str] = "wan"
    CONVENTION: ClassVar[str | None] = "sd3"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL, DIFFUSERS)
    ROLES: ClassVar[Mapping[str, str]] = {"text_embed": "patch_embed", "modulation": "adaln_blocks"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `Wan`, beside `BackboneConfig`.

        Attributes:
            attn: token mixer of the patches.
            cross: token mixer of the patches over the text.
            frames: latent frames of the example; other numbers are accepted.
            size: height and width of its latents; others are accepted.
            channels: channels of the latents.
            condition_channels: channels of what stands beside the latents, 0 for none.
            patch: frames, rows and columns of a patch.
            text_dim: width of a text token.
            text_length: number of text tokens of the example; other numbers are accepted.
            rope: rotary tables over (frame, row, column).
        """

        attn: BaseConfig = part("attention", Attention.Config(qk_norm="across-heads"))
        cross: BaseConfig = part("attention", Attention.Config(qk_norm="across-heads"))
        ffn: BaseConfig | None = part("ffn", MLP.Config())
        block: BaseConfig = part("block", AdaLNSingle.Config(cross_norm=True))
        frames: Count = 21
        size: tuple[Count, Count] = (60, 104)
        channels: Count = 16
        condition_channels: Natural = 0
        patch: tuple[Count, Count, Count] = (1, 2, 2)
        text_dim: Count = 4096
        text_length: Count = 512
        rope: GridRope.Config = GridRope.Config(temperature=1e4)

        def check(self) -> None:
            sizes = (self.frames, *self.size)
            if any(n % p for n, p in zip(sizes, self.patch, strict=True)):
                raise ValueError(
                    f"frames {self.frames} and size {self.size} are not divisible by patch {self.patch}"
                )

    def __init__(self, config: Wan.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        dim, width = config.dim, head_width(config)
        site = Site(
            dim=dim, heads=config.heads, cond_dim=6 * dim, time_dim=dim, memory_dim=dim,
            grid=(None, None, None), norm=NormRule(qk_kind="rms"),
        )  # fmt: skip
        channels = config.channels + config.condition_channels
        self.patch_embed = PatchEmbed(channels, dim, config.patch)
        self.text_embed = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embed = TimeEmbedding(dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.rope = GridRope(config.rope, width, heads=config.heads, depth=config.depth, axes=3)
        self.blocks = build_stack(
            config, site, Needs(rope=width), name=self.name, cross=config.cross
        )
        self.final = FinalLayer(
            replace(site, cond_dim=2 * dim), config.patch, config.channels, by=SharedModulation
        )
        reset_parameters(
            self, self.patch_embed, self.final, self.time_embed.fc1, self.time_embed.fc2
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        *,
        condition: Tensor | None = None,
        text_mask: Tensor | None = None,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            x: (B, C, T, H, W) latents, T, H and W divisible by the patch.
            t: (B,) time in [0, 1000], 1000 = noise.
            text: (B, L, text_dim) tokens of the text.
            condition: (B, condition_channels, T, H, W) what stands beside the latents.
            text_mask: (B, L) bool, True = a token of the text.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, C, T, H, W).

        Raises:
            ValueError: a shape does not fit, or the condition is missing.
            CapabilityError: a condition for a model without, or a mask of the text, but the mixer
                over it cannot.
        """
        self._check(x, t, text, condition, text_mask)
        grid = self._cells(x)
        h = self.patch_embed(x if condition is None else torch.cat([x, condition], dim=1))
        positions = self.rope.positions(grid, device=x.device)
        (rope,) = self.rope(positions, like=h)
        time = self.time_embed(t, x.dtype)
        ctx = Context(
            cond=self.modulation(F.silu(time)), time=time, grid=grid, positions=positions, rope=rope,
            memory=self.text_embed(text), memory_mask=text_mask,
            ledger=ledger, tap=tap, complete=complete,
        )  # fmt: skip
        for block in self.blocks:
            h = block(h, ctx)
        return unpatchify_video(self.final(h, torch.cat([time, time], -1)), grid, self.config.patch)

    def _cells(self, x: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of patches."""
        frames, rows, columns = self.config.patch
        return x.shape[2] // frames, x.shape[3] // rows, x.shape[4] // columns

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        c, like = self.config, self.patch_embed.proj.weight

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

        inputs = {
            "x": drawn(batch, c.channels, c.frames, *c.size),
            "t": drawn(batch).sigmoid() * 1000,
            "text": drawn(batch, c.text_length, c.text_dim),
        }
        if c.condition_channels:
            inputs["condition"] = drawn(batch, c.condition_channels, c.frames, *c.size)
        return inputs

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        video = {0: "batch", 2: "frames", 3: "height", 4: "width"}
        words = {0: "batch", 1: "words"}
        axes = {"x": video, "t": {0: "batch"}, "text": words, "text_mask": dict(words)}
        return axes | {"condition": dict(video)} if self.config.condition_channels else axes

    def _check(
        self, x: Tensor, t: Tensor, text: Tensor, condition: Tensor | None, mask: Tensor | None
    ) -> None:
        c, where, batch = self.config, self.name, x.shape[0]
        shown = f"(B, {c.channels}, T, H, W)"
        check_shape(x, shown, (None, c.channels, None, None, None), where=f"{where}: x")
        check_shape(t, "(B,)", (batch,), where=f"{where}: t")
        wide = (batch, None, c.text_dim)
        check_shape(text, f"(B, L, {c.text_dim})", wide, where=f"{where}: text")
        if mask is not None:
            check_mask(mask, where=f"{where}: text_mask")
            check_shape(mask, "(B, L)", (batch, text.shape[1]), where=f"{where}: text_mask")
        size, beside = tuple(x.shape[2:]), c.condition_channels
        if any(n % p for n, p in zip(size, c.patch, strict=True)):
            raise ValueError(f"{where}: {size} is not divisible by patch {c.patch}")
        if condition is None:
            if beside:
                raise ValueError(
                    f"{where}: the condition is missing; give condition (B, {beside}, T, H, W), of the "
                    "size of x"
                )
            return
        if not beside:
            raise CapabilityError(f"{where}: built without a condition; condition_channels is 0")
        shown = f"(B, {beside}, T, H, W), of the size of x"
        check_shape(condition, shown, (batch, beside, *size), where=f"{where}: condition")


def _published(
    title: str, params: int, summary: str, *, dim: int, hidden: int, depth: int, steps: int = 50,
    guidance: float = 5.0, shift: float = 5.0, **changes: Any,
) -> Preset:  # fmt: skip
    """A released model, with heads of 128 channels."""
    return Preset(
        config=Wan.Config(
            dim=dim, depth=depth, heads=dim // 128, ffn=MLP.Config(hidden=hidden), **changes
        ),
        params=params,
        source=f"released weights and code of {title}",
        licence="Apache-2.0",
        sampling={"steps": steps, "guidance": guidance, "shift": shift},
        aliases=(title,),
        summary=f"{title}: {summary}.",
    )


_LARGE: Mapping[str, Any] = {"dim": 5120, "hidden": 13824, "depth": 40}
_HALF = "one of its two networks"
PRESETS = {
    "wan-1.3b": _published(
        "Wan2.1-T2V-1.3B", 1_418_996_800, "videos of a text, 480 x 832", dim=1536, hidden=8960,
        depth=30, guidance=6.0, shift=8.0,
    ),
    "wan-14b": _published(
        "Wan2.1-T2V-14B", 14_288_491_584, "videos of a text, 720 x 1280", **_LARGE, size=(90, 160)
    ),
    "wan2.2-14b": _published(
        "Wan2.2-T2V-A14B", 14_288_491_584, f"videos of a text, {_HALF}", **_LARGE, size=(90, 160),
        steps=40, guidance=4.0, shift=12.0,
    ),
    "wan2.2-14b-i2v": _published(
        "Wan2.2-I2V-A14B", 14_288_901_184, f"videos that begin with an image, {_HALF}", **_LARGE,
        size=(90, 160), condition_channels=20, steps=40, guidance=3.5,
    ),
    "wan2.2-5b": _published(
        "Wan2.2-TI2V-5B", 4_999_787_712, "videos of a text, 704 x 1280", dim=3072, hidden=14336,
        depth=30, frames=31, size=(44, 80), channels=48,
    ),
    "wan-tiny": Preset(
        config=Wan.Config(
            dim=32, depth=2, heads=2, frames=3, size=(4, 6), channels=4, text_dim=24, text_length=6
        ),
        summary="A size of ours for tests and examples.",
    ),
}  # fmt: skip
register_presets(Wan, PRESETS, paper="2503.20314")
