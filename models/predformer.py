"""PredFormer: the next frames of a video from the last ones, by attention over time and space.

Reference: PredFormer: Transformers Are Effective Spatial-Temporal Predictive Learners, 2024, arXiv
2410.04733.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from effformer.attention import Attention, Mixer
from effformer.blocks import BackboneConfig, Branch, Gated, Needs, build_stack
from effformer.checks import check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap, explained
from effformer.ffn import SwiGLU
from effformer.layout import Layout
from effformer.nn.embeddings import is_formula, sincos_1d
from effformer.nn.init import truncated_normal_linears
from effformer.nn.lengths import is_fixed
from effformer.nn.norms import make_norm
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.site import NormRule, Site
from effformer.values import Chance, Count

from .base import Model, Preset, register_presets
from .layouts.predformer import FACTORIZED, OFFICIAL

__all__ = ["PRESETS", "PredFormer"]


class PredFormer(Model):
    """Video prediction without recurrence: patches of T frames, a stack of blocks that mix along
    time or space, T further frames in one pass.

    A unit is a run of blocks that ends with a norm; nothing but the tokens passes from one unit to
    the next. Its blocks mix along time ("t" in ``config.axes``), within frames ("s"), or both
    ("f"). Positions are fixed sinusoids of the running number of a token in space-time, computed
    for the size of the input.

    Args:
        config: the config.
        name: preset name.

    Differs from the paper: the FacST code reads the tokens behind its last unit in transposed order;
    here every arrangement is right unless ``transposed_head`` is asked for. Any mixer, FFN and
    schedule goes, and inputs of other sizes.

    Reference: PredFormer: Transformers Are Effective Spatial-Temporal Predictive Learners, 2024,
    arXiv 2410.04733.

    Example:
        >>> model = effformer.build_model("predformer-tiny", attn="flow", axes="ts")
        >>> model(torch.zeros(2, 5, 1, 32, 32)).shape
        torch.Size([2, 5, 1, 32, 32])
        >>> model.predict(torch.zeros(2, 5, 1, 32, 32), frames=12).shape
        torch.Size([2, 12, 1, 32, 32])
    """

    FAMILY: ClassVar[str] = "predformer"
    ROLES: ClassVar[Mapping[str, str]] = {"head": "head"}
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL, FACTORIZED)
    positions: Tensor

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `PredFormer`, beside `BackboneConfig`.

        Attributes:
            frames: T, number of frames in, and out of one pass.
            channels: channels of a frame.
            size: height and width of a frame.
            patch: patch side.
            attn_dropout: probability behind token mixers; None means ``dropout``.
            transposed_head: the head reads the tokens of the last unit in the order (space, time)
                as if it were (time, space), as the official FacST code does; weights trained by it
                need this.
        """

        attn: BaseConfig = part("attention", Attention.Config(qkv_bias=False))
        ffn: BaseConfig = part("ffn", SwiGLU.Config(ratio=4.0))
        block: BaseConfig = part("block", Gated.Config())
        axes: str = "tsst"
        drop_path_rule: Literal["linear", "uniform"] = "uniform"
        frames: Count = 10
        channels: Count = 1
        size: tuple[Count, Count] = (64, 64)
        patch: Count = 8
        attn_dropout: Chance | None = None
        transposed_head: bool = False

        def check(self) -> None:
            if any(side % self.patch for side in self.size):
                raise ValueError(f"size {self.size} is not divisible by patch {self.patch}")
            if self.dim % 2:
                raise ValueError(f"dim must be even for sines and cosines, got {self.dim}")

        @property
        def grid(self) -> tuple[int, int, int]:
            """Frames, rows and columns of patches."""
            return self.frames, self.size[0] // self.patch, self.size[1] // self.patch

    def __init__(self, config: PredFormer.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        frames, rows, columns = config.grid
        tokens = frames * rows * columns
        site = Site(
            dim=config.dim,
            heads=config.heads,
            norm=NormRule(eps=1e-5),
            length=tokens,
            grid=config.grid,
        )
        self.patch_embed = PatchEmbed(config.channels, config.dim, config.patch)
        self.register_buffer("positions", _positions(tokens, config.dim), persistent=False)
        self.blocks = build_stack(config, site, Needs(), name=self.name)
        self.norm = make_norm(site)
        self.head = nn.Linear(config.dim, config.patch**2 * config.channels)
        if config.attn_dropout is not None:
            self._set_mixer_dropout(config.attn_dropout)
        truncated_normal_linears(self.blocks)

    def reset_buffers(self) -> None:
        """Compute the positions again."""
        tokens, dim = self.positions.shape
        self.positions = _positions(tokens, dim).to(self.positions)

    def forward(
        self,
        x: Tensor,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """The next frames.

        Args:
            x: (B, T, C, H, W) frames, H and W divisible by the patch.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, T, C, H, W), the T frames behind those of x.

        Raises:
            ValueError: a shape does not fit.
        """
        config, grid = self.config, self.grid_of(x)
        h = self.encode(
            self.embed(x), Context(grid=grid, ledger=ledger, tap=tap, complete=complete)
        )
        patches = self.head(self.norm(h)).unflatten(1, (grid[0], -1)).flatten(0, 1)
        return unpatchify(patches, grid[1], grid[2], config.patch).unflatten(0, (-1, grid[0]))

    def grid_of(self, x: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of patches of x (B, T, C, H, W).

        Raises:
            ValueError: the shape does not fit.
        """
        config = self.config
        shown = f"(B, T, {config.channels}, H, W)"
        check_shape(x, shown, (None, None, config.channels, None, None), where=f"{self.name}: x")
        height, width = x.shape[3:]
        if height % config.patch or width % config.patch:
            raise ValueError(
                f"{self.name}: ({height}, {width}) is not divisible by patch {config.patch}"
            )
        return x.shape[1], height // config.patch, width // config.patch

    def embed(self, x: Tensor) -> Tensor:
        """Tokens with positions, frame after frame: (B, T, C, H, W) to (B, T N, D)."""
        h = self.patch_embed(x.flatten(0, 1)).unflatten(0, (-1, x.shape[1])).flatten(1, 2)
        # a graph for every size carries the formula, and `dynamic_axes` says whether that is the table
        every = torch.compiler.is_exporting() and not is_fixed(h.shape[1])
        if every or h.shape[1] != self.positions.shape[0]:
            return h + _positions(h.shape[1], h.shape[2]).to(h)
        return h + self.positions

    def encode(self, h: Tensor, ctx: Context) -> Tensor:
        """The blocks, and the order in which the head reads: (B, T N, D) to (B, T N, D)."""
        for block in self.blocks:
            h = block(h, ctx)
        if self.config.transposed_head:
            assert ctx.grid is not None
            h = h.unflatten(1, (ctx.grid[0], -1)).transpose(1, 2).flatten(1, 2)
        return h

    def predict(self, x: Tensor, frames: int) -> Tensor:
        """Any number of further frames: predictions are fed back until there are enough.

        Args:
            x: (B, T, C, H, W) frames.
            frames: number of frames wanted, at least 1.

        Returns:
            (B, frames, C, H, W).

        Raises:
            ValueError: no frame is asked for, or a shape does not fit.
        """
        if frames < 1:
            raise ValueError(f"{self.name}: predict: frames must be at least 1, got {frames}")
        made = [self(x)]
        while len(made) * x.shape[1] < frames:
            made.append(self(made[-1]))
        return torch.cat(made, dim=1)[:, :frames]

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        config, weight = self.config, self.head.weight
        shape = (batch, config.frames, config.channels, *config.size)
        return {
            "x": torch.rand(shape, dtype=weight.dtype, device=weight.device, generator=generator)
        }

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        own = is_formula(self.positions, _positions(*self.positions.shape))
        return {"x": {0: "batch", **({1: "frames", 3: "height", 4: "width"} if own else {})}}

    def _set_mixer_dropout(self, rate: float) -> None:
        for branch in self.blocks.modules():
            if isinstance(branch, Branch) and isinstance(branch.part, Mixer):
                for module in branch.part.modules():
                    if isinstance(module, nn.Dropout):
                        module.p = rate


def _positions(tokens: int, dim: int) -> Tensor:
    """Sines in even channels, cosines in odd ones, of the running number of a token, (N, D)."""
    codes = sincos_1d(torch.arange(tokens), dim)
    return codes.unflatten(1, (2, -1)).transpose(1, 2).flatten(1).float()


_VARIANTS = {
    "full": "f", "facst": "st", "facts": "ts", "binst": "st", "bints": "ts", "tst": "tst",
    "sts": "sts", "tsst": "tsst", "stts": "stts",
}  # fmt: skip
_DATA: dict[str, dict[str, Any]] = {
    "mnist": {},
    "taxibj": {"frames": 4, "channels": 2, "size": (32, 32), "patch": 4, "dropout": 0.1,
               "drop_path": 0.1},
    "weather": {"frames": 12, "size": (32, 64), "patch": 4, "dropout": 0.1, "drop_path": 0.25,
                "ffn": {"ratio": 2.0}},
    "human": {"frames": 4, "channels": 3, "size": (256, 256), "dropout": 0.1, "drop_path": 0.1},
}  # fmt: skip
_TITLES = {
    "mnist": "Moving MNIST",
    "taxibj": "TaxiBJ",
    "weather": "WeatherBench",
    "human": "Human3.6M",
}
_DEPTHS = {"mnist": (24, 24), "taxibj": (8, 6), "weather": (8, 6), "human": (12, 12)}
"""Number of blocks, and that of triplets."""
_PARAMS = {
    "mnist": (25_285_952, 25_286_464, 25_297_728, 25_297_728),
    "taxibj": (8_434_976, 8_435_488, 8_438_560, 6_333_216),
    "weather": (5_272_848, 5_273_360, 5_276_432, 3_959_568),
    "human": (12_725_696, 12_726_208, 12_731_328, 12_731_328),
}
"""Parameters: full, factorized, binary and quadruplet, triplet."""


def _presets() -> dict[str, Preset]:
    """Nine arrangements for each of four data sets, and a tiny size of ours."""
    presets = {}
    for data, changes in _DATA.items():
        base = PredFormer.Config(dim=256, depth=1, heads=8, axes="f").replace(**changes)
        for variant, layer in _VARIANTS.items():
            kind = 0 if variant == "full" else 1 if "fac" in variant else len(layer)
            depth = _DEPTHS[data][kind == 3]
            unit = depth // len(layer) if kind < 2 else 1
            axes = "".join(letter * unit for letter in layer) if kind == 1 else layer
            presets[f"predformer-{data}-{variant}"] = Preset(
                config=base.replace(depth=depth, axes=axes, block={"unit": unit}),
                params=_PARAMS[data][3 if kind == 3 else min(kind, 2)],
                source=f"arXiv 2410.04733, {_TITLES[data]}",
                aliases=(f"predformer-{data}",) if variant == "tsst" else (),
                summary=f"PredFormer for {_TITLES[data]}, arrangement {variant}.",
            )
    presets["predformer-tiny"] = Preset(
        config=PredFormer.Config(
            dim=48, depth=4, heads=3, frames=5, size=(32, 32), ffn=SwiGLU.Config(ratio=2.0)
        ),
        summary="A size of ours for tests and examples.",
    )
    return presets


PRESETS = _presets()
register_presets(PredFormer, PRESETS, paper="2410.04733")
