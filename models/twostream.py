"""JointDiT: image and text as two streams that meet in every attention.

Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv
2403.03206.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from effformer.blocks import Needs, build_stack, head_width
from effformer.context import Context, Ledger, Tap, explained
from effformer.nn.embeddings import TimeEmbedding, sincos_2d
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.nn.rope import GridRope
from effformer.site import NormRule, Site

from .base import Model, Preset, register_presets
from .diffusion_parts import FinalLayer, reset_parameters
from .twostream_parts import (
    PooledEmbedding,
    TwoStreamConfig,
    check_inputs,
    example_inputs,
    open_axes,
    packed_text,
)

__all__ = ["PRESETS", "JointDiT"]


class JointDiT(Model):
    """A small text-to-image transformer of ours out of two-stream blocks (MMDiT).

    ``forward(x, t, text, pooled)`` returns the velocity (B, C, H, W); t = 0 is noise, t = 1 data.
    Patches of x are one stream, the tokens of the text the other; time and pooled text modulate
    both. Text tokens have no positions, so their order means nothing.

    Args:
        config: the config.
        name: preset name.

    Differs from the paper: positions are computed for every grid instead of cropped from a table; a
    key mask of the text is honoured; time in [0, 1] counts from noise to data.

    Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv
    2403.03206.
    """

    FAMILY: ClassVar[str] = "joint-dit"
    CONVENTION: ClassVar[str | None] = "effformer"
    ROLES: ClassVar[Mapping[str, str]] = {"text_embed": "patch_embed"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(TwoStreamConfig):
        """Knobs of `JointDiT`, beside `TwoStreamConfig`.

        Attributes:
            rope: rotary tables of the image tokens in place of added sin-cos positions, or None.
        """

        rope: GridRope.Config | None = None

        def check(self) -> None:
            TwoStreamConfig.check(self)
            if self.rope is not None and self.rope.kind == "mixed":
                raise ValueError("rope: kind 'mixed' differs by layer; use 'axial' or 'centered'")

    def __init__(self, config: JointDiT.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        dim, rope = config.dim, None
        site = Site(
            dim=dim, heads=config.heads, cond_dim=dim, time_dim=dim, norm=NormRule(affine=True)
        )
        self.patch_embed = PatchEmbed(config.channels, dim, config.patch)
        self.text_embed = nn.Linear(config.text_dim, dim)
        self.time_embed = TimeEmbedding(dim)
        if config.pooled_dim is not None:
            self.pooled_embed = PooledEmbedding(config.pooled_dim, dim)
        if config.rope is not None:
            rope = head_width(config)
            self.rope = GridRope(config.rope, rope, heads=config.heads, depth=config.depth)
        needs = Needs(mask="key", rope=rope, joint=True)
        self.blocks = build_stack(config, site, needs, name=self.name)
        self.final = FinalLayer(
            replace(site, norm=NormRule(affine=False)), config.patch, config.channels
        )
        time = self.time_embed
        reset_parameters(self, self.patch_embed, self.final, time.fc1, time.fc2)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        pooled: Tensor | None = None,
        *,
        text_mask: Tensor | None = None,
        packed: bool = False,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            x: (B, C, H, W) latents, H and W divisible by the patch.
            t: (B,) time in [0, 1].
            text: (B, L, text_dim) tokens of the text.
            pooled: (B, pooled_dim) pooled text; None adds nothing.
            text_mask: (B, L) bool, True = a token of the text.
            packed: compute real tokens of the text only (needs ``text_mask``).
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: a shape does not fit, or ``packed`` without a mask.
            CapabilityError: ``packed``, but a part cannot.
        """
        check_inputs(self.config, x, t, text, pooled, text_mask, where=self.name)
        rows, columns = (size // self.config.patch for size in x.shape[2:])
        h = self.patch_embed(x)
        y, mask, packing = packed_text(self.text_embed(text), text_mask, packed, where=self.name)
        time = self.time_embed(t, x.dtype)
        cond = time if pooled is None else time + self.pooled_embed(pooled)
        positions = rope = None
        if self.config.rope is None:
            h = h + sincos_2d(rows, columns, self.config.dim).to(h)
        else:
            positions = self.rope.positions((rows, columns), device=x.device)
            (rope,) = self.rope(positions, like=h)
        both = Context(cond=cond, time=time, ledger=ledger, tap=tap, complete=complete)
        image = replace(both, positions=positions, rope=rope, grid=(rows, columns))
        words = replace(both, mask=mask, packing=packing)
        for block in self.blocks:
            h, y = block(h, y, image, words)
        return unpatchify(self.final(h, cond), rows, columns, self.config.patch)

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        like = self.patch_embed.proj.weight
        return example_inputs(self.config, like, batch, generator=generator)

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return open_axes(self.config)


_OURS = "A size of ours for tests and examples."
PRESETS = {
    f"joint-dit-{size}": Preset(
        config=JointDiT.Config(dim=dim, depth=depth, heads=heads), summary=_OURS
    )
    for size, (dim, depth, heads) in {"tiny": (96, 3, 3), "nano": (48, 2, 2)}.items()
}
register_presets(JointDiT, PRESETS, paper="2403.03206")
