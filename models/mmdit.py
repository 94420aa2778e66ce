"""MMDiT: the transformers of Stable Diffusion 3 and 3.5.

Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv
2403.03206.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effformer.attention import Attention
from effformer.blocks import Joint, Needs, build_stack
from effformer.context import Context, Ledger, Tap, explained
from effformer.layout import Layout
from effformer.nn.embeddings import TimeEmbedding, sincos_2d
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.site import NormRule, Site
from effformer.values import Count

from .base import Model, Preset, register_presets
from .diffusion_parts import FinalLayer, reset_parameters
from .layouts.mmdit import LAYOUTS
from .twostream_parts import (
    PooledEmbedding,
    TwoStreamConfig,
    check_inputs,
    example_inputs,
    open_axes,
    packed_text,
)

__all__ = ["PRESETS", "MMDiT"]


class MMDiT(Model):
    """Text-to-image transformer of two streams: patches of a latent, and tokens of a text, which
    meet in every attention; time and pooled text modulate both.

    ``forward(x, t, text, pooled)`` returns the velocity (B, C, H, W) as SD3 writes it
    (`FlowConvention` "sd3"): t = 0 is data, t = 1000 noise, and the velocity points to the noise.
    ``text`` are the features of CLIP-L and CLIP-G side by side, padded to the width of T5, with
    those of T5 behind them; ``pooled`` those of CLIP-L and CLIP-G. Text tokens have no positions. An
    absent text is zeros: ``guided(model, 5.0, null={"text": 0, "pooled": 0})``, or the features of
    the empty text as the authors' samples have it.

    SD3.5 normalises queries and keys (``attn={"qk_norm": True}``); its medium size has a second
    attention of the image in the first 13 blocks (``block={"name": "joint", "dual": 13}``), and
    gains from guidance away from itself without blocks 7, 8 and 9: ``guided(..., weak=Weak(2.5,
    {"skip_layers": (7, 8, 9)}))``.

    Args:
        config: the config.
        name: preset name.

    Differs from the paper: a key mask of the text is honoured; where none is given, padding is
    attended to, as the published weights are used to.

    Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv
    2403.03206.
    """

    FAMILY: ClassVar[str] = "mmdit"
    CONVENTION: ClassVar[str | None] = "sd3"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = LAYOUTS
    ROLES: ClassVar[Mapping[str, str]] = {"text_embed": "patch_embed"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(TwoStreamConfig):
        """Knobs of `MMDiT`, beside `TwoStreamConfig`.

        Attributes:
            table_size: rows and columns of the saved position table, from whose middle the
                positions of every smaller grid are cut.
            table_base: rows and columns of a grid that the table spans, in whole numbers.
        """

        table_size: Count = 192
        table_base: Count = 64

        def check(self) -> None:
            TwoStreamConfig.check(self)
            if self.input_size // self.patch > self.table_size:
                raise ValueError(
                    f"table_size {self.table_size} is smaller than the grid of input_size "
                    f"{self.input_size} with patch {self.patch}"
                )

    def __init__(self, config: MMDiT.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        dim, side = config.dim, config.table_size
        site = Site(
            dim=dim, heads=config.heads, cond_dim=dim, time_dim=dim, norm=NormRule(qk_kind="rms")
        )
        self.patch_embed = PatchEmbed(config.channels, dim, config.patch)
        self.register_buffer("pos_embed", sincos_2d(side, side, dim, step=config.table_base / side))
        self.text_embed = nn.Linear(config.text_dim, dim)
        self.time_embed = TimeEmbedding(dim)
        if config.pooled_dim is not None:
            self.pooled_embed = PooledEmbedding(config.pooled_dim, dim)
        needs = Needs(mask="key", joint=True)
        self.blocks = build_stack(config, site, needs, name=self.name)
        self.final = FinalLayer(site, config.patch, config.channels)
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
        skip_layers: Sequence[int] = (),
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            x: (B, C, H, W) latents, H and W divisible by the patch.
            t: (B,) time in [0, 1000], 1000 = noise.
            text: (B, L, text_dim) tokens of the text.
            pooled: (B, pooled_dim) pooled text; None only for a model without.
            text_mask: (B, L) bool, True = a token of the text.
            packed: compute real tokens of the text only (needs ``text_mask``).
            skip_layers: indices of blocks that both streams pass by.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: a shape does not fit, there is no such block, or ``packed`` without a mask.
            CapabilityError: ``packed``, but a part cannot.
        """
        self._check(x, t, text, pooled, text_mask, skip_layers)
        rows, columns = (size // self.config.patch for size in x.shape[2:])
        h = self.patch_embed(x) + self.positions(rows, columns)
        y, mask, packing = packed_text(self.text_embed(text), text_mask, packed, where=self.name)
        time = self.time_embed(t, x.dtype)
        cond = time if pooled is None else time + self.pooled_embed(pooled)
        both = Context(cond=cond, time=time, ledger=ledger, tap=tap, complete=complete)
        image = replace(both, grid=(rows, columns))
        words = replace(both, mask=mask, packing=packing)
        skipped = {i % len(self.blocks) for i in skip_layers}
        for i, block in enumerate(self.blocks):
            if i not in skipped:
                h, y = block(h, y, image, words)
        return unpatchify(self.final(h, cond), rows, columns, self.config.patch)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Positions (1, rows * columns, D) of a grid: the middle of the table."""
        side = self.config.table_size
        top, left = (side - rows) // 2, (side - columns) // 2
        table = self.get_buffer("pos_embed").view(side, side, -1)
        return table[top : top + rows, left : left + columns].reshape(1, rows * columns, -1)

    def assumed(self) -> Mapping[str, Any] | None:
        return {
            "convention": self.CONVENTION, "null": True,
            "latent_scale": 1.5305, "latent_shift": 0.0609,
        }  # fmt: skip

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        like = self.patch_embed.proj.weight
        return example_inputs(self.config, like, batch, scale=1000.0, generator=generator)

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return open_axes(self.config)

    def _check(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        pooled: Tensor | None,
        mask: Tensor | None,
        skip: Sequence[int],
    ) -> None:
        config = self.config
        check_inputs(config, x, t, text, pooled, mask, where=self.name)
        if pooled is None and config.pooled_dim is not None:
            raise ValueError(
                f"{self.name}: the pooled text is missing; give pooled (B, {config.pooled_dim}), "
                "zeros for an absent text"
            )
        side = config.table_size * config.patch
        if x.shape[2] > side or x.shape[3] > side:
            raise ValueError(
                f"{self.name}: x of {x.shape[2]} x {x.shape[3]} is larger than the position table, "
                f"which serves {side} x {side} (table_size={config.table_size}, "
                f"patch={config.patch})"
            )
        depth = len(self.blocks)
        given = skip if isinstance(skip, Sequence) else (skip,)
        if wrong := [i for i in given if i not in range(-depth, depth)]:
            raise ValueError(
                f"{self.name}: skip_layers names block {wrong[0]!r}, but there are {depth} blocks"
            )
        if given is not skip:
            raise TypeError(f"{self.name}: skip_layers lists blocks, such as ({skip!r},)")


_NORMED = Attention.Config(qk_norm=True)
_LICENCE = "Stability AI Community License (research, and commerce up to a yearly revenue; gated)"
_OURS = "A size of ours for tests and examples."


def _released(
    name: str, params: int, *, depth: int, steps: int, guidance: float, **options: Any
) -> Preset:
    """A published size, for 1024 x 1024 pixels, 77 tokens of CLIP and 77 of T5."""
    return Preset(
        config=MMDiT.Config(
            dim=64 * depth, depth=depth, heads=depth, input_size=128, channels=16,
            text_dim=4096, text_length=154, pooled_dim=2048, **options,
        ),
        params=params,
        source=f"released weights ({name}) and code of arXiv 2403.03206",
        licence=_LICENCE,
        sampling={"steps": steps, "guidance": guidance, "shift": 3.0},
        aliases=(name,),
    )  # fmt: skip


PRESETS = {
    "sd3-medium": _released(
        "stable-diffusion-3-medium", 2_028_328_000, depth=24, steps=50, guidance=5.0
    ),
    "sd3.5-medium": _released(
        "stable-diffusion-3.5-medium",
        2_243_171_520,
        depth=24,
        steps=50,
        guidance=5.0,
        attn=_NORMED,
        block=Joint.Config(dual=13),
        table_size=384,
    ),
    "sd3.5-large": _released(
        "stable-diffusion-3.5-large", 8_056_627_520, depth=38, steps=40, guidance=4.5, attn=_NORMED
    ),
    "mmdit-tiny": Preset(
        config=MMDiT.Config(dim=96, depth=3, heads=3, table_size=32, table_base=8), summary=_OURS
    ),
    "mmdit-nano": Preset(
        config=MMDiT.Config(
            dim=48,
            depth=2,
            heads=2,
            table_size=32,
            table_base=8,
            attn=_NORMED,
            block=Joint.Config(dual=1),
        ),
        summary=_OURS,
    ),
}
register_presets(MMDiT, PRESETS, paper="2403.03206")
