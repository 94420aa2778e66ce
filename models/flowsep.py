"""FlowSep: the sound that a text names out of a mixture, by rectified flow on latents of a mel spectrogram.

Reference: FlowSep: Language-Queried Sound Separation with Rectified Flow Matching, 2024, arXiv 2409.07614.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.attention import Attention
from effformer.blocks import Block, Needs, StackConfig, build_stack
from effformer.checks import check_mask, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap, explained
from effformer.ffn import GEGLU
from effformer.layout import Layout
from effformer.nn.embeddings import TimeEmbedding
from effformer.site import Layer, NormRule, Site
from effformer.values import Count, Natural, Positive

from .base import Model, Preset, register_presets
from .layouts.flowsep import LAYOUTS

__all__ = ["BLOCKS", "PRESETS", "FlowSep", "Step"]

BLOCKS = 3
"""Blocks at a place with attention: one that only mixes tokens, one with an FFN, one that also attends to
the text.
"""


class Step(NamedTuple):
    """A step on the way through the network.

    Attributes:
        entering: channels that come in, with those that left the way down.
        width: channels that go on.
        attends: there are blocks behind the convolutions.
        convolves: there are convolutions at all; else it only changes the size.
        resize: factor on the size behind them.
    """

    entering: int
    width: int
    attends: bool = False
    convolves: bool = True
    resize: float = 1.0


class FlowSep(Model):
    """U-Net over a latent: residual convolutions at several sizes, between them transformer blocks over the
    cells, of which every third attends to a text. What leaves the way down enters the way up.

    ``forward(x, t, text, mixture)`` returns the velocity (B, C, H, W); t = 0 is noise, t = 1 data (`FlowConvention`
    "flowsep", whose path leaves a little noise in the data). The latent of the mixture stands beside x as
    further channels, the same at every step. ``text`` are the last hidden states of FLAN-T5-large, of 50 tokens.

    Args:
        config: the config; ``layers`` counts the blocks on the way, three at every place with attention.
        name: preset name.

    Differs from the paper: a text of which no token counts gives nothing instead of the mean of all tokens.

    Reference: FlowSep: Language-Queried Sound Separation with Rectified Flow Matching, 2024, arXiv 2409.07614;
    High-Resolution Image Synthesis with Latent Diffusion Models, 2021, arXiv 2112.10752 (the network).
    """

    FAMILY: ClassVar[str] = "flowsep"
    CONVENTION: ClassVar[str | None] = "flowsep"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = LAYOUTS
    ROLES: ClassVar[Mapping[str, str]] = {"stem": "patch_embed", "head": "head"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(StackConfig):
        """Knobs of `FlowSep`, beside `StackConfig`.

        Attributes:
            attn: token mixer of the cells.
            cross: token mixer of the cells over the text.
            dim: channels at full size.
            multipliers: channels over ``dim`` at every size; each is half of the one before.
            residuals: residual blocks at a size on the way down; on the way up there is one more.
            attention: factors by which the latent is smaller where blocks stand.
            head_dim: width of a head.
            groups: groups of channels that share a norm.
            input_size: height and width of the example; others that can be halved as often are accepted.
            channels: channels of the latent.
            mixture: channels of the mixture beside it, 0 for none.
            text_dim: width of a text token.
            text_length: number of text tokens of the example; other numbers are accepted.
            time_scale: factor on the time before its features; published weights saw t in [0, 1] as it is.
        """

        attn: BaseConfig = part("attention", Attention.Config(qkv_bias=False))
        cross: BaseConfig = part("attention", Attention.Config(qkv_bias=False))
        ffn: BaseConfig | None = part("ffn", GEGLU.Config(ratio=4.0))
        dim: Count = 128
        multipliers: tuple[Count, ...] = (1, 2, 3, 5)
        residuals: Count = 2
        attention: tuple[Count, ...] = (2, 4, 8)
        head_dim: Count = 32
        groups: Count = 32
        input_size: tuple[Count, Count] = (256, 16)
        channels: Count = 8
        mixture: Natural = 8
        text_dim: Count = 1024
        text_length: Count = 50
        time_scale: Positive = 1.0

        def check(self) -> None:
            sizes = [2**level for level in range(len(self.multipliers))]
            if not sizes:
                raise ValueError("multipliers: give one for every size, got none")
            if wrong := set(self.attention) - set(sizes):
                raise ValueError(
                    f"attention: no size is {max(wrong)} times smaller; sizes: {sizes}"
                )
            if any(side % sizes[-1] for side in self.input_size):
                raise ValueError(f"input_size {self.input_size} is not divisible by {sizes[-1]}")
            widths = {self.dim, *(step.entering for step in self.way if step.convolves)}
            if wrong := {width for width in widths if width % self.groups}:
                raise ValueError(f"{min(wrong)} channels are not divisible by groups {self.groups}")
            if wrong := {
                step.width for step in self.way if step.attends and step.width % self.head_dim
            }:
                raise ValueError(
                    f"{min(wrong)} channels are not divisible by head_dim {self.head_dim}"
                )

        @property
        def down(self) -> list[Step]:
            """From the full size to the smallest."""
            steps, width = [], self.dim
            for level, factor in enumerate(self.multipliers):
                if level:
                    steps.append(Step(width, width, convolves=False, resize=0.5))
                for _ in range(self.residuals):
                    steps.append(Step(width, factor * self.dim, 2**level in self.attention))
                    width = factor * self.dim
            return steps

        @property
        def middle(self) -> Step:
            """At the smallest size; further convolutions follow it."""
            width = self.multipliers[-1] * self.dim
            return Step(width, width, attends=True)

        @property
        def up(self) -> list[Step]:
            """From the smallest size to the full one."""
            steps, width = [], self.middle.width
            left = [self.dim, *(step.width for step in self.down)]
            for level, factor in reversed([*enumerate(self.multipliers)]):
                for i in range(self.residuals + 1):
                    last = i == self.residuals and level > 0
                    entering, width = width + left.pop(), factor * self.dim
                    attends = 2**level in self.attention
                    steps.append(Step(entering, width, attends, resize=2.0 if last else 1.0))
            return steps

        @property
        def way(self) -> list[Step]:
            """All steps."""
            return [*self.down, self.middle, *self.up]

        @property
        def depth(self) -> int:
            """Number of blocks."""
            return BLOCKS * sum(step.attends for step in self.way)

        def plain_layer(self, index: int) -> Layer:
            layer = StackConfig.plain_layer(self, index)
            return layer if index % BLOCKS else replace(layer, ffn=None)

    def __init__(self, config: FlowSep.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        dim, channels = config.dim, config.channels + config.mixture
        time, groups = 4 * dim, config.groups
        self.time_embed = TimeEmbedding(time, features=dim)
        self.stem = nn.Conv2d(channels, dim, 3, padding=1)
        self.down = nn.ModuleList(Stage(step, config, time) for step in config.down)
        self.middle = Stage(config.middle, config, time)
        self.middle_residual = Residual(config.middle.width, config.middle.width, config, time)
        self.up = nn.ModuleList(Stage(step, config, time) for step in config.up)
        self.head_norm = nn.GroupNorm(groups, dim)
        self.head = nn.Conv2d(dim, channels, 3, padding=1)
        sites = [
            Site(
                dim=step.width, heads=step.width // config.head_dim, time_dim=time,
                memory_dim=config.text_dim if i == BLOCKS - 1 else None, grid=(None, None),
                norm=NormRule(eps=1e-5),
            )
            for step in config.way if step.attends for i in range(BLOCKS)
        ]  # fmt: skip
        self.blocks = build_stack(config, sites, Needs(), name=self.name, cross=config.cross)
        zeroed(self.head)

    @property
    def long_skips(self) -> list[tuple[int, int]]:
        """Blocks (i, j): what leaves block i, perhaps convolved, enters block j beside what came before it."""
        left, found, done = [-1], set(), -1
        for step in self.config.down:
            done += BLOCKS * step.attends
            left.append(done)
        done += BLOCKS
        for step in self.config.up:
            if (source := left.pop()) >= 0 and done + 1 < self.config.depth:
                found.add((source, done + 1))
            done += BLOCKS * step.attends
        return sorted(found)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        mixture: Tensor | None = None,
        *,
        text_mask: Tensor | None = None,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            x: (B, C, H, W) latents, H and W divisible by the smallest size.
            t: (B,) time in [0, 1], 1 = data.
            text: (B, L, text_dim) tokens of the text.
            mixture: (B, mixture, H, W) latent of the mixture; None only for a model without.
            text_mask: (B, L) bool, True = a token of the text.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: a shape does not fit, or the mixture is missing.
            CapabilityError: a mask of the text, but the mixer over it cannot.
        """
        self._check(x, t, text, mixture, text_mask)
        time = self.time_embed(
            t if self.config.time_scale == 1 else t * self.config.time_scale, x.dtype
        )
        ctx = Context(
            time=time, memory=text, memory_mask=text_mask, ledger=ledger, tap=tap, complete=complete,
        )  # fmt: skip
        blocks = iter(self.blocks)
        h = self.stem(x if mixture is None else torch.cat([x, mixture], dim=1))
        left = [h]
        for stage in self.down:
            h = stage(h, ctx, blocks)
            left.append(h)
        h = self.middle_residual(self.middle(h, ctx, blocks), time)
        for stage in self.up:
            h = stage(torch.cat([h, left.pop()], dim=1), ctx, blocks)
        return self.head(F.silu(self.head_norm(h)))[:, : self.config.channels]

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        c, like = self.config, self.stem.weight

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

        inputs = {
            "x": drawn(batch, c.channels, *c.input_size),
            "t": drawn(batch).sigmoid(),
            "text": drawn(batch, c.text_length, c.text_dim),
        }
        return inputs | ({"mixture": drawn(batch, c.mixture, *c.input_size)} if c.mixture else {})

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        latent, words = {0: "batch", 2: "height", 3: "width"}, {0: "batch", 1: "words"}
        axes = {"x": latent, "t": {0: "batch"}, "text": words, "text_mask": words}
        return axes | ({"mixture": latent} if self.config.mixture else {})

    def _check(
        self, x: Tensor, t: Tensor, text: Tensor, mixture: Tensor | None, mask: Tensor | None
    ) -> None:
        c, batch = self.config, x.shape[0]
        latent = (None, c.channels, None, None)
        check_shape(x, f"(B, {c.channels}, H, W)", latent, where=f"{self.name}: x")
        if (mixture is None) == bool(c.mixture):
            raise ValueError(
                f"{self.name}: the mixture is missing; give mixture (B, {c.mixture}, H, W), its latent"
                if c.mixture
                else f"{self.name}: built without a mixture (mixture=0); leave mixture out"
            )
        shapes = [
            ("t", t, "(B,)", (batch,)),
            ("text", text, f"(B, L, {c.text_dim})", (batch, None, c.text_dim)),
        ]
        if mixture is not None:
            whole = (batch, c.mixture, *x.shape[2:])
            shapes.append(("mixture", mixture, f"(B, {c.mixture}, H, W) of x", whole))
        if mask is not None:
            check_mask(mask, where=f"{self.name}: text_mask")
            shapes.append(("text_mask", mask, "(B, L)", (batch, text.shape[1])))
        for name, value, shown, shape in shapes:
            check_shape(value, shown, shape, where=f"{self.name}: {name}")
        smallest = 2 ** (len(c.multipliers) - 1)
        if x.shape[2] % smallest or x.shape[3] % smallest:
            raise ValueError(f"{self.name}: {tuple(x.shape[2:])} is not divisible by {smallest}")


class Stage(nn.Module):
    """One `Step`: residual convolutions, blocks over the cells, another size.

    Args:
        step: what there is.
        config: the model's.
        time_dim: width of the embedded time.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"resize": "convs"}

    def __init__(self, step: Step, config: FlowSep.Config, time_dim: int) -> None:
        super().__init__()
        self.step = step
        if step.convolves:
            self.residual = Residual(step.entering, step.width, config, time_dim)
        self.cells = nn.ModuleList(
            Cells(step.width, config.groups) for _ in range(2 * step.attends)
        )
        if step.resize != 1:
            stride = 2 if step.resize < 1 else 1
            self.resize = nn.Conv2d(step.width, step.width, 3, stride=stride, padding=1)

    def forward(self, h: Tensor, ctx: Context, blocks: Iterator[Block]) -> Tensor:
        """(B, C, H, W) to another width and size; the next of ``blocks`` are taken."""
        if self.step.convolves:
            h = self.residual(h, ctx.time)
        alone = replace(ctx, memory=None, memory_mask=None)
        for cells, count in zip(self.cells, (BLOCKS - 1, 1), strict=False):
            h = cells(h, alone if count > 1 else ctx, [next(blocks) for _ in range(count)])
        if self.step.resize > 1:
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return h if self.step.resize == 1 else self.resize(h)


class Residual(nn.Module):
    """``skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + W silu(e))))``; starts as the skip alone.

    Args:
        entering: channels that come in.
        width: channels that go out.
        config: gives groups and dropout.
        time_dim: width of e.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"time": "adaln_blocks", "": "convs"}

    def __init__(self, entering: int, width: int, config: FlowSep.Config, time_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, entering)
        self.conv1 = nn.Conv2d(entering, width, 3, padding=1)
        self.time = nn.Linear(time_dim, width)
        self.norm2 = nn.GroupNorm(config.groups, width)
        self.drop = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if entering == width else nn.Conv2d(entering, width, 1)
        zeroed(self.conv2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Convolve x (B, C, H, W) under the embedded time (B, T)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(self.drop(F.silu(self.norm2(h))))


class Cells(nn.Module):
    """Blocks over the cells of a map, ``x + leave(blocks(enter(norm(x))))``; starts as the identity.

    Args:
        width: channels of the map.
        groups: groups of channels that share a norm.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"": "projections"}

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.enter = nn.Linear(width, width)
        self.leave = nn.Linear(width, width)
        zeroed(self.leave)

    def forward(self, x: Tensor, ctx: Context, blocks: list[Block]) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        grid = x.shape[2], x.shape[3]
        h = self.enter(self.norm(x).flatten(2).transpose(1, 2))
        for block in blocks:
            h = block(h, replace(ctx, grid=grid))
        return x + self.leave(h).transpose(1, 2).unflatten(2, grid)


def zeroed(last: nn.Module) -> None:
    """Let a layer start at zero."""
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


PRESETS = {
    "flowsep": Preset(
        config=FlowSep.Config(),
        params=265_549_456,
        source="released weights and code of FlowSep (Audio-AGI/FlowSep)",
        licence="that of the release of FlowSep (research)",
        sampling={"steps": 10},
        aliases=("FlowSep",),
    ),
    "flowsep-tiny": Preset(
        config=FlowSep.Config(
            dim=16, multipliers=(1, 2), residuals=1, attention=(2,), head_dim=8, groups=8, input_size=(8, 4),
            channels=4, mixture=4, text_dim=12, text_length=6,
        ),
        sampling={"steps": 10},
        summary="A size of ours for tests and examples.",
    ),
}  # fmt: skip
register_presets(FlowSep, PRESETS, paper="2409.07614")
