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

from effformer.blocks import BackboneConfig, Joint, Needs, build_stack, head_width
from effformer.checks import CapabilityError, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Packing, Tap, explained
from effformer.nn.embeddings import TimeEmbedding, sincos_2d
from effformer.nn.init import xavier_linears
from effformer.nn.norms import Modulation
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.nn.rope import GridRope
from effformer.site import NormRule, Site
from effformer.values import Count

from .base import Model, Preset, register_presets
from .diffusion_parts import FinalLayer

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
    ROLES: ClassVar[Mapping[str, str]] = {"text_embed": "patch_embed", "pooled_embed": "t_mlp"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `JointDiT`, beside `BackboneConfig`.

        Attributes:
            input_size: side of the example image; other sizes are accepted.
            channels: input channels.
            patch: patch side.
            text_dim: width of a text token.
            text_length: number of text tokens of the example; other numbers are accepted.
            pooled_dim: width of the pooled text, None if there is none.
            rope: rotary tables of the image tokens in place of added sin-cos positions, or None.
        """

        block: BaseConfig = part("block", Joint.Config())
        input_size: Count = 16
        channels: Count = 4
        patch: Count = 2
        text_dim: Count = 32
        text_length: Count = 8
        pooled_dim: Count | None = 32
        rope: GridRope.Config | None = None

        def check(self) -> None:
            if self.input_size % self.patch:
                raise ValueError(
                    f"input_size {self.input_size} is not divisible by patch {self.patch}"
                )
            if self.dim % 4:
                raise ValueError(f"dim must be divisible by 4 for 2-D positions, got {self.dim}")
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
            self.pooled_embed = nn.Sequential(
                nn.Linear(config.pooled_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
            )
        if config.rope is not None:
            rope = head_width(config)
            self.rope = GridRope(config.rope, rope, heads=config.heads, depth=config.depth)
        needs = Needs(cond=True, time=True, mask="key", rope=rope, joint=True)
        self.blocks = build_stack(config, site, needs, name=self.name)
        self.final = FinalLayer(
            replace(site, norm=NormRule(affine=False)), config.patch, config.channels
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as DiT does: blocks are the identity on both streams, the output is zero."""
        xavier_linears(self)
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        for table in (self.time_embed.fc1, self.time_embed.fc2):
            nn.init.normal_(table.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                module.reset_parameters()
        nn.init.zeros_(self.final.linear.weight)
        nn.init.zeros_(self.final.linear.bias)

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
        self._check(x, t, text, pooled, text_mask)
        rows, columns = (size // self.config.patch for size in x.shape[2:])
        h, y, packing = self.patch_embed(x), self.text_embed(text), None
        time = self.time_embed(t, x.dtype)
        cond = time if pooled is None else time + self.pooled_embed(pooled)
        positions = rope = None
        if self.config.rope is None:
            h = h + sincos_2d(rows, columns, self.config.dim).to(h)
        else:
            positions = self.rope.positions((rows, columns), device=x.device)
            (rope,) = self.rope(positions, like=h)
        if packed:
            if text_mask is None:
                raise ValueError(f"{self.name}: packed=True needs text_mask")
            packing, text_mask = Packing.from_mask(text_mask), None
            y = packing.pack(y)
        both = Context(cond=cond, time=time, ledger=ledger, tap=tap, complete=complete)
        image = replace(both, positions=positions, rope=rope, grid=(rows, columns))
        words = replace(both, mask=text_mask, packing=packing)
        for block in self.blocks:
            h, y = block(h, y, image, words)
        return unpatchify(self.final(h, cond), rows, columns, self.config.patch)

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        config, like = self.config, self.patch_embed.proj.weight

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

        side = config.input_size
        inputs = {
            "x": drawn(batch, config.channels, side, side),
            "t": drawn(batch).sigmoid(),
            "text": drawn(batch, config.text_length, config.text_dim),
        }
        if config.pooled_dim is not None:
            inputs["pooled"] = drawn(batch, config.pooled_dim)
        return inputs

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        axes = super().dynamic_axes()
        axes["x"] |= {2: "height", 3: "width"}
        axes["text"] |= {1: "words"}
        return axes

    def _check(
        self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor | None, mask: Tensor | None
    ) -> None:
        config, batch = self.config, x.shape[0]
        shapes = [
            ("x", x, f"(B, {config.channels}, H, W)", (None, config.channels, None, None)),
            ("t", t, "(B,)", (batch,)),
            ("text", text, f"(B, L, {config.text_dim})", (batch, None, config.text_dim)),
        ]
        if pooled is not None:
            if config.pooled_dim is None:
                raise CapabilityError(f"{self.name}: built without pooled text; pooled_dim is None")
            width = config.pooled_dim
            shapes.append(("pooled", pooled, f"(B, {width})", (batch, width)))
        if mask is not None:
            shapes.append(("text_mask", mask, "(B, L)", (batch, text.shape[1])))
        for name, value, shown, shape in shapes:
            check_shape(value, shown, shape, where=f"{self.name}: {name}")
        if x.shape[2] % config.patch or x.shape[3] % config.patch:
            raise ValueError(
                f"{self.name}: {tuple(x.shape[2:])} is not divisible by patch {config.patch}"
            )


_OURS = "A size of ours for tests and examples."
PRESETS = {
    f"joint-dit-{size}": Preset(
        config=JointDiT.Config(dim=dim, depth=depth, heads=heads), summary=_OURS
    )
    for size, (dim, depth, heads) in {"tiny": (96, 3, 3), "nano": (48, 2, 2)}.items()
}
register_presets(JointDiT, PRESETS, paper="2403.03206")
