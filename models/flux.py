"""FLUX.1: image and text as two streams, then as one.

Reference: the released code of FLUX.1, 2024; FLUX.1 Kontext: Flow Matching for In-Context Image
Generation and Editing in Latent Space, 2025, arXiv 2506.15742.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effformer.attention import Attention
from effformer.blocks import Joint, Needs, Parallel, build_stack, head_width
from effformer.checks import CapabilityError, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Packing, Tap, explained
from effformer.layout import Layout
from effformer.nn.embeddings import TimeEmbedding
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.nn.precision import widened
from effformer.nn.rope import GridRope
from effformer.site import Layer, NormRule, Site
from effformer.values import Count, Depth, Natural

from .base import Model, Preset, register_presets
from .diffusion_parts import FinalLayer, reset_parameters
from .layouts.flux import DIFFUSERS, OFFICIAL
from .twostream_parts import (
    PooledEmbedding,
    TwoStreamConfig,
    check_inputs,
    example_inputs,
    open_axes,
    packed_text,
)

__all__ = ["PRESETS", "Flux"]


class Flux(Model):
    """Text-to-image transformer whose first blocks have a stream for the image and one for the text
    (`Joint`), and whose others read both as one row, text first (`Parallel`, attention and FFN as
    one branch).

    ``forward(x, t, text, pooled, guidance_scale)`` returns the velocity as FLUX writes it
    (`FlowConvention` "flux"): t = 0 is data, t = 1 noise, and the velocity points to the noise.
    Patches of 2 x 2 are tokens. Every token has coordinates for its rotary tables: (0, row, column)
    in the image, (0, 0, 0) in the text, (1, row, column) in a reference. Time, scale of guidance and
    pooled text modulate every block. ``text`` are features of T5, ``pooled`` those of CLIP-L.

    Dev is told the scale of guidance that it was distilled to imitate; schnell has no use for it,
    and takes any. Fill, canny and depth read further channels of the image's size: ``condition``
    holds the masked latent and the 8 x 8 cells of the mask (16 + 64 channels, ``pixel_unshuffle``),
    or the latent of the control (16). Kontext, weights of the same form as dev, takes the latent of
    an image to edit as ``reference``, whose tokens stand behind those of the image.

    Dev is sampled along ``TimeGrid.uniform(50).shifted(shift_of_length(tokens))`` with scales of 2.5
    to 4, schnell in 1 to 4 steps without a shift.

    Args:
        config: the config.
        name: preset name.

    Raises:
        ValueError: the widths of the rotary tables are not those of the heads.
        CapabilityError: a part cannot do what its block needs; parts that can are named.

    Differs from the paper: a key mask of the text is honoured; angles are computed in float32.

    Reference: FLUX.1 Kontext: Flow Matching for In-Context Image Generation and Editing in Latent
    Space, 2025, arXiv 2506.15742.
    """

    FAMILY: ClassVar[str] = "flux"
    CONVENTION: ClassVar[str | None] = "flux"
    ROLES: ClassVar[Mapping[str, str]] = {"text_embed": "patch_embed"}
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL, DIFFUSERS)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(TwoStreamConfig):
        """Knobs of `Flux`, beside `TwoStreamConfig`.

        Attributes:
            depth: number of blocks of both kinds, which ``layers`` counts through.
            doubles: how many blocks, the first ones, have two streams.
            single: arrangement of the others, as ``block`` of these.
            condition_channels: channels of what stands beside the latent, 0 for none.
            guidance: the network is told the scale of guidance.
            rope: rotary tables over (image, row, column).
        """

        attn: BaseConfig = part("attention", Attention.Config(qk_norm=True))
        block: BaseConfig = part("block", Joint.Config(ends=False))
        single: BaseConfig = part("block", Parallel.Config(fused=True))
        dim: Count = 3072
        depth: Depth = 57
        heads: Count = 24
        doubles: Natural = 19
        input_size: Count = 128
        channels: Count = 16
        condition_channels: Natural = 0
        text_dim: Count = 4096
        text_length: Count = 512
        pooled_dim: Count | None = 768
        guidance: bool = True
        rope: GridRope.Config = GridRope.Config(temperature=1e4, widths=(16, 56, 56))

        def check(self) -> None:
            TwoStreamConfig.check(self)
            if self.doubles > self.depth:
                raise ValueError(
                    f"doubles={self.doubles} blocks of two streams are more than all, depth={self.depth}"
                )

        def plain_layer(self, index: int) -> Layer:
            layer = TwoStreamConfig.plain_layer(self, index)
            return layer if index < self.doubles else replace(layer, block=self.single)

    def __init__(self, config: Flux.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        dim, width = config.dim, head_width(config)
        site = Site(
            dim=dim, heads=config.heads, cond_dim=dim, time_dim=dim, norm=NormRule(qk_kind="rms")
        )
        self.patch_embed = PatchEmbed(
            config.channels + config.condition_channels, dim, config.patch
        )
        self.text_embed = nn.Linear(config.text_dim, dim)
        self.time_embed = TimeEmbedding(dim)
        if config.guidance:
            self.guidance_embed = TimeEmbedding(dim)
        if config.pooled_dim is not None:
            self.pooled_embed = PooledEmbedding(config.pooled_dim, dim)
        self.rope = GridRope(config.rope, width, heads=config.heads, depth=config.depth, axes=3)
        single = Needs(mask="key", rope=width)
        needs = [replace(single, joint=i < config.doubles) for i in range(config.depth)]
        self.blocks = build_stack(config, site, needs, name=self.name)
        self.final = FinalLayer(site, config.patch, config.channels)
        told = [self.time_embed, self.guidance_embed] if config.guidance else [self.time_embed]
        tables = [table for embed in told for table in (embed.fc1, embed.fc2)]
        reset_parameters(self, self.patch_embed, self.final, *tables)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        pooled: Tensor | None = None,
        guidance_scale: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        reference: Tensor | None = None,
        text_mask: Tensor | None = None,
        packed: bool = False,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            x: (B, C, H, W) latents, H and W divisible by the patch.
            t: (B,) time in [0, 1], 1 = noise.
            text: (B, L, text_dim) tokens of the text.
            pooled: (B, pooled_dim) pooled text; None only for a model without.
            guidance_scale: (B,) such as 3.5; None only for a model that is not told.
            condition: (B, condition_channels, H, W) what stands beside the latents.
            reference: (B, C, H', W') latents of an image to look at.
            text_mask: (B, L) bool, True = a token of the text.
            packed: compute real tokens of the text only (needs ``text_mask``).
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: a shape does not fit, an input is missing, or ``packed`` without a mask.
            CapabilityError: an input that the model has no place for, or ``packed``, but a part
                cannot.
        """
        self._check(x, t, text, pooled, guidance_scale, text_mask)
        self._check_pictures(x, condition, reference)
        words, cells = text.shape[1], self._cells(x)
        h, positions = self._image(x, condition, reference, words)
        y, mask, packing = packed_text(self.text_embed(text), text_mask, packed, where=self.name)
        (rope,) = self.rope(positions, like=h)
        time = self.time_embed(1000 * widened(t), x.dtype)
        both = Context(
            cond=self._cond(time, pooled, guidance_scale), time=time, positions=positions, rope=rope,
            ledger=ledger, tap=tap, complete=complete,
        )  # fmt: skip
        far = slice(words, None)
        image = replace(both, positions=positions[:, far], rope=rope.tokens(far))
        wording = replace(both, positions=None, rope=None, mask=mask, packing=packing)
        for block in self.blocks[: self.config.doubles]:
            h, y = block(h, y, image, wording)
        y = y if packing is None else packing.unpack(y)
        row = self._singles(torch.cat([y, h], dim=1), both, text_mask, packed)
        out = self.final(row[:, words : words + cells[0] * cells[1]], both.cond)
        return unpatchify(out, *cells, self.config.patch, channels_first=True)

    def _singles(self, row: Tensor, ctx: Context, text_mask: Tensor | None, packed: bool) -> Tensor:
        """The blocks of one stream on the tokens of text and image (B, L + N, D)."""
        packing = None
        if text_mask is not None:
            seen = text_mask.new_ones(row.shape[0], row.shape[1] - text_mask.shape[1])
            mask = torch.cat([text_mask, seen], dim=1)
            ctx = replace(ctx, mask=mask)
            if packed:
                packing = Packing.from_mask(mask)
                row, ctx = packing.pack(row), _packed(ctx, packing)
        for block in self.blocks[self.config.doubles :]:
            row = block(row, ctx)
        return row if packing is None else packing.unpack(row)

    def _cells(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        return x.shape[2] // self.config.patch, x.shape[3] // self.config.patch

    def _image(
        self, x: Tensor, condition: Tensor | None, reference: Tensor | None, words: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens of image and reference, and the coordinates (1, L + N, 3) of the text's and these."""
        h = self.patch_embed(x if condition is None else torch.cat([x, condition], dim=1))
        places: Tensor = self.rope.positions((1, *self._cells(x)), front=words, device=x.device)
        if reference is None:
            return h, places
        again = self.rope.positions((1, *self._cells(reference)), device=x.device)
        again = again + again.new_tensor([1.0, 0.0, 0.0])
        h = torch.cat([h, self.patch_embed(reference)], dim=1)
        return h, torch.cat([places, again], dim=1)

    def _cond(self, time: Tensor, pooled: Tensor | None, scale: Tensor | None) -> Tensor:
        """What modulates the blocks, (B, D)."""
        cond = time
        if self.config.guidance and scale is not None:
            cond = cond + self.guidance_embed(1000 * widened(scale), time.dtype)
        return cond if pooled is None else cond + self.pooled_embed(pooled)

    def assumed(self) -> Mapping[str, Any] | None:
        return {
            "convention": self.CONVENTION, "latent_scale": 0.3611, "latent_shift": 0.1159,
            "steps": None if self.config.guidance else 4,  # what is not told a scale is schnell
        }  # fmt: skip

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        config, like = self.config, self.text_embed.weight
        inputs = example_inputs(config, like, batch, generator=generator)
        if config.guidance:
            drawn = torch.rand(batch, dtype=like.dtype, device=like.device, generator=generator)
            inputs["guidance_scale"] = 1 + 4 * drawn
        if config.condition_channels:
            shape = (batch, config.condition_channels, config.input_size, config.input_size)
            inputs["condition"] = torch.randn(
                shape, dtype=like.dtype, device=like.device, generator=generator
            )
        return inputs

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        axes = open_axes(self.config) | {
            "reference": {0: "batch", 2: "reference_height", 3: "reference_width"}
        }
        if self.config.guidance:
            axes["guidance_scale"] = {0: "batch"}
        if self.config.condition_channels:
            axes["condition"] = dict(axes["x"])
        return axes

    def _check(
        self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor | None, scale: Tensor | None,
        mask: Tensor | None,
    ) -> None:  # fmt: skip
        config, where = self.config, self.name
        check_inputs(config, x, t, text, pooled, mask, where=where)
        if pooled is None and config.pooled_dim is not None:
            raise ValueError(
                f"{where}: the pooled text is missing; give pooled (B, {config.pooled_dim}), zeros for "
                "an absent text"
            )
        if scale is None and config.guidance:
            raise ValueError(
                f"{where}: the scale of guidance is missing; give guidance_scale (B,), such as 3.5"
            )
        if scale is not None:
            check_shape(scale, "(B,)", (x.shape[0],), where=f"{where}: guidance_scale")

    def _check_pictures(
        self, x: Tensor, condition: Tensor | None, reference: Tensor | None
    ) -> None:
        config, where, batch = self.config, self.name, x.shape[0]
        beside, channels, patch = config.condition_channels, config.channels, config.patch
        if condition is None and beside:
            raise ValueError(
                f"{where}: the condition is missing; give condition (B, {beside}, H, W), of the size "
                "of x"
            )
        if condition is not None:
            if not beside:
                raise CapabilityError(
                    f"{where}: built without a condition; condition_channels is 0"
                )
            shown, shape = f"(B, {beside}, H, W)", (batch, beside, *x.shape[2:])
            check_shape(condition, f"{shown}, of the size of x", shape, where=f"{where}: condition")
        if reference is None:
            return
        if beside:
            raise CapabilityError(
                f"{where}: a reference has no condition beside it, and this model reads one "
                f"(condition_channels is {beside})"
            )
        shape = (batch, channels, None, None)
        check_shape(reference, f"(B, {channels}, H', W')", shape, where=f"{where}: reference")
        size = tuple(reference.shape[2:])
        if size[0] % patch or size[1] % patch:
            raise ValueError(f"{where}: reference: {size} is not divisible by patch {patch}")


def _packed(ctx: Context, packing: Packing) -> Context:
    """The context of the real tokens alone; tables and coordinates are those of their places."""
    assert ctx.positions is not None
    assert ctx.rope is not None
    places = packing.positions
    return replace(
        ctx, mask=None, packing=packing, positions=ctx.positions[:, places],
        rope=ctx.rope.tokens(places),
    )  # fmt: skip


_DEV = "FLUX.1 [dev] Non-Commercial License (gated)"
_SHIFT = 3.1582  # of 4,096 tokens, the example's; see `effformer.flow.shift_of_length`


def _published(
    title: str, params: int, summary: str, scale: float | None, steps: int = 50,
    licence: str = _DEV, **changes: Any,
) -> Preset:  # fmt: skip
    """A released model: what differs from dev, and how it is sampled."""
    told = {"shift": 1.0} if scale is None else {"guidance_scale": scale, "shift": _SHIFT}
    return Preset(
        config=Flux.Config(guidance=scale is not None, **changes),
        params=params,
        source=f"released weights and code of FLUX.1 {title}",
        licence=licence,
        sampling={"steps": steps, **told},
        aliases=(f"FLUX.1-{title.replace(' ', '-')}",),
        summary=f"FLUX.1 {title}: {summary}.",
    )


PRESETS = {
    "flux-dev": _published(
        "dev", 11_901_408_320, "images of a text, distilled to imitate a scale of guidance", 3.5
    ),
    "flux-schnell": _published(
        "schnell", 11_891_178_560, "images of a text in 1 to 4 steps", None, 4, "Apache-2.0",
        text_length=256,
    ),
    "flux-fill": _published(
        "Fill dev", 11_902_391_360, "what a mask leaves open in an image", 30.0, condition_channels=80
    ),
    "flux-canny": _published(
        "Canny dev", 11_901_604_928, "images with given edges", 30.0, condition_channels=16
    ),
    "flux-depth": _published(
        "Depth dev", 11_901_604_928, "images with given depths", 10.0, condition_channels=16
    ),
    "flux-kontext": _published(
        "Kontext dev", 11_901_408_320, "an image changed as a text says", 2.5, 30
    ),
    "flux-tiny": Preset(
        config=Flux.Config(
            dim=32, depth=3, heads=2, doubles=1, input_size=8, channels=4, text_dim=24, text_length=6,
            pooled_dim=16, rope=GridRope.Config(temperature=1e4, widths=(4, 6, 6)),
        ),
        summary="A size of ours for tests and examples.",
    ),
}  # fmt: skip
register_presets(Flux, PRESETS, paper="2506.15742")
