"""TriFlow: latents of a reconstruction model, made from a text at a cost linear in their number.

Reference: Taming Feed-forward Reconstruction Models as Latent Encoders for 3D Generative Models, 2024,
arXiv 2501.00651; Scalable Adaptive Computation for Iterative Generation, 2022, arXiv 2212.11972 (reading
and writing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from effformer.attention import Attention
from effformer.blocks import AdaLNZero, BackboneConfig, Joint, Layer, Needs, build_stack
from effformer.checks import check_mask, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap, explained
from effformer.nn.embeddings import TimeEmbedding, sincos_2d
from effformer.nn.init import xavier_linears
from effformer.nn.norms import Modulation
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.site import NormRule, Site
from effformer.values import Count, Depth

from .base import Model, Preset, register_presets
from .reading import Reading

__all__ = ["PRESETS", "TriFlow"]


class TriFlow(Model):
    """Three streams: many tokens of data, a few learned latents, and a text. The latents read the data, think
    about it together with the text, and write into the data, several times; data tokens never see each
    other, so that work is linear in their number.

    In the first run latents and text are two streams of joint blocks; then they are one row, of which all
    tokens read and write. ``forward(x, t, text)`` returns the velocity (B, P, C, H, W); t = 0 is noise, t = 1
    data. A triplane has three planes; one plane is an image, T of them are a video.

    Args:
        config: the config; ``layers`` counts the blocks of all runs.
        name: preset name.

    Differs from the paper: neither code nor weights nor its section of methods are public, so that runs and
    streams are those of its figure, and everything else is ours: what reads and writes, widths, positions,
    learned latents, and the mask of the text.

    Reference: Taming Feed-forward Reconstruction Models as Latent Encoders for 3D Generative Models, 2024,
    arXiv 2501.00651.
    """

    FAMILY: ClassVar[str] = "triflow"
    CONVENTION: ClassVar[str | None] = "effformer"
    ROLES: ClassVar[Mapping[str, str]] = {"text_embed": "patch_embed", "head": "final_linear"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `TriFlow`, beside `BackboneConfig`, whose width and heads are those of latents and text.

        Attributes:
            attn: token mixer of latents and text.
            cross: token mixer of what reads and writes.
            block: arrangement of the blocks of the first run, which have two streams.
            single: that of the others.
            depth: number of blocks of all runs.
            runs: blocks between a reading and a writing.
            latents: number of learned latents.
            data_dim: width of a token of the data.
            data_heads: heads of what writes into the data.
            planes: number of planes.
            input_size: side of the example's planes; others that the patch divides are accepted.
            channels: channels of a plane.
            patch: patch side.
            text_dim: width of a text token.
            text_length: number of text tokens of the example; other numbers are accepted.
        """

        cross: BaseConfig = part("attention", Attention.Config())
        block: BaseConfig = part("block", Joint.Config(ends=False))
        single: BaseConfig = part("block", AdaLNZero.Config())
        dim: Count = 768
        depth: Depth = 9
        heads: Count = 12
        runs: tuple[Count, ...] = (3, 3, 3)
        latents: Count = 256
        data_dim: Count = 768
        data_heads: Count = 12
        planes: Count = 3
        input_size: Count = 64
        channels: Count = 80
        patch: Count = 2
        text_dim: Count = 768
        text_length: Count = 77

        def check(self) -> None:
            if sum(self.runs) != self.depth:
                raise ValueError(
                    f"runs {self.runs} have {sum(self.runs)} blocks together, but depth is {self.depth}"
                )
            if self.data_dim % 4:
                raise ValueError(
                    f"data_dim must be divisible by 4 for 2-D positions, got {self.data_dim}"
                )
            if self.input_size % self.patch:
                raise ValueError(
                    f"input_size {self.input_size} is not divisible by patch {self.patch}"
                )

        def plain_layer(self, index: int) -> Layer:
            layer = BackboneConfig.plain_layer(self, index)
            return layer if index < self.runs[0] else replace(layer, block=self.single)

    def __init__(self, config: TriFlow.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        dim, width = config.dim, config.data_dim
        site = Site(
            dim=dim, heads=config.heads, cond_dim=dim, time_dim=dim,
            norm=NormRule(affine=False, qk_kind="rms"),
        )  # fmt: skip
        self.patch_embed = PatchEmbed(config.channels, width, config.patch)
        self.plane_embed = nn.Parameter(torch.randn(config.planes, 1, width) * 0.02)
        self.text_embed = nn.Linear(config.text_dim, dim)
        self.latents = nn.Parameter(torch.randn(config.latents, dim) * 0.02)
        self.time_embed = TimeEmbedding(dim)
        masked = Needs(mask="key")
        needs = [replace(masked, joint=i < config.runs[0]) for i in range(config.depth)]
        self.blocks = build_stack(config, site, needs, name=self.name)
        self.reads, self.writes = nn.ModuleList(), nn.ModuleList()
        for i in range(len(config.runs)):
            here = replace(site, memory_dim=width, path=f"reads.{i}")
            there = replace(
                site, dim=width, heads=config.data_heads, memory_dim=dim, path=f"writes.{i}"
            )
            self.reads.append(Reading(config.cross, config.ffn, here, masked))
            self.writes.append(Reading(config.cross, config.ffn, there, masked))
        self.head = nn.Linear(width, config.patch**2 * config.channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Everything that is added starts at zero, and so does the answer."""
        xavier_linears(self)
        for module in self.modules():
            if isinstance(module, Modulation):
                module.reset_parameters()
        nn.init.zeros_(self.head.weight)

    @property
    def long_skips(self) -> list[tuple[int, int]]:
        """What leaves the last block of a run is written into the data, too."""
        ends = [sum(self.config.runs[: i + 1]) for i in range(len(self.config.runs) - 1)]
        return [(end - 1, self.config.depth) for end in ends]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        *,
        text_mask: Tensor | None = None,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            x: (B, P, C, H, W) planes, H and W divisible by the patch.
            t: (B,) time in [0, 1].
            text: (B, L, text_dim) tokens of the text.
            text_mask: (B, L) bool, True = a token of the text.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, P, C, H, W).

        Raises:
            ValueError: a shape does not fit.
        """
        self._check(x, t, text, text_mask)
        time = self.time_embed(t, x.dtype)
        ctx = Context(cond=time, time=time, ledger=ledger, tap=tap, complete=complete)
        h = self.answer(self.tokens(x), self.text_embed(text), ctx, text_mask)
        planes = self.head(h).unflatten(1, (self.config.planes, -1)).flatten(0, 1)
        cells = x.shape[3] // self.config.patch, x.shape[4] // self.config.patch
        image = unpatchify(planes, *cells, self.config.patch)
        return image.unflatten(0, (-1, self.config.planes))

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, N, data_dim) of planes, one plane behind the other, row by row, with their places."""
        rows, columns = (side // self.config.patch for side in x.shape[3:])
        h = self.patch_embed(x.flatten(0, 1)).unflatten(0, (-1, self.config.planes))
        places = sincos_2d(rows, columns, self.config.data_dim).to(h)
        return (h + places + self.plane_embed).flatten(1, 2)

    def answer(self, h: Tensor, y: Tensor, ctx: Context, text_mask: Tensor | None) -> Tensor:
        """What becomes of tokens (B, N, data_dim) of the data, in any order, beside the text (B, L, D)."""
        z = self.latents.to(h.dtype).expand(h.shape[0], -1, -1)
        first, mask = self.config.runs[0], None
        start = 0
        for read, write, count in zip(self.reads, self.writes, self.config.runs, strict=True):
            z = read(z, replace(ctx, memory=h))
            for block in self.blocks[start : start + count]:
                if start < first:
                    z, y = block(z, y, ctx, replace(ctx, mask=text_mask))
                else:
                    z = block(z, replace(ctx, mask=mask))
            h = write(h, replace(ctx, memory=z, memory_mask=mask))
            start += count
            if start == first:
                z = torch.cat([z, y], dim=1)
                if text_mask is not None:
                    seen = text_mask.new_ones(z.shape[0], self.config.latents)
                    mask = torch.cat([seen, text_mask], dim=1)
        return h

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        c, like = self.config, self.text_embed.weight

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

        return {
            "x": drawn(batch, c.planes, c.channels, c.input_size, c.input_size),
            "t": drawn(batch).sigmoid(),
            "text": drawn(batch, c.text_length, c.text_dim),
        }

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        words = {0: "batch", 1: "words"}
        return {
            "x": {0: "batch", 3: "height", 4: "width"},
            "t": {0: "batch"}, "text": words, "text_mask": words,
        }  # fmt: skip

    def _check(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor | None) -> None:
        c, batch = self.config, x.shape[0]
        shapes = [
            (
                "x",
                x,
                f"(B, {c.planes}, {c.channels}, H, W)",
                (None, c.planes, c.channels, None, None),
            ),
            ("t", t, "(B,)", (batch,)),
            ("text", text, f"(B, L, {c.text_dim})", (batch, None, c.text_dim)),
        ]
        if mask is not None:
            check_mask(mask, where=f"{self.name}: text_mask")
            shapes.append(("text_mask", mask, "(B, L)", (batch, text.shape[1])))
        for name, value, shown, shape in shapes:
            check_shape(value, shown, shape, where=f"{self.name}: {name}")
        if x.shape[3] % c.patch or x.shape[4] % c.patch:
            raise ValueError(
                f"{self.name}: {tuple(x.shape[3:])} is not divisible by patch {c.patch}"
            )


_FIGURE = (
    "figure of the architecture in arXiv 2501.00651 (runs); widths are ours, none are published"
)
PRESETS = {
    "triflow-s": Preset(
        config=TriFlow.Config(dim=512, heads=8, data_dim=512, data_heads=8), source=_FIGURE,
        summary="TriFlow over triplanes of 3 x 80 x 64 x 64, 512 wide.",
    ),
    "triflow-b": Preset(
        config=TriFlow.Config(), source=_FIGURE,
        summary="TriFlow over triplanes of 3 x 80 x 64 x 64, 768 wide.",
    ),
    "triflow-tiny": Preset(
        config=TriFlow.Config(
            dim=32, depth=3, heads=2, runs=(1, 1, 1), latents=5, data_dim=24, data_heads=3, input_size=4,
            channels=4, text_dim=12, text_length=6,
        ),
        summary="A size of ours for tests and examples.",
    ),
}  # fmt: skip
register_presets(TriFlow, PRESETS, paper="2501.00651")
