"""Flowformer as a hierarchical image classifier.

Reference: Flowformer: Linearizing Transformers with Conservation Flows, 2022, arXiv 2202.06258.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effformer.attention import Attention
from effformer.attention.flow import FLOW_PRESETS
from effformer.blocks import Needs, PreNorm, StackConfig, build_stack
from effformer.checks import check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap, explained
from effformer.ffn import MLP
from effformer.layout import Layout
from effformer.nn.init import truncated_normal_linears
from effformer.nn.norms import make_norm
from effformer.nn.patch import PatchEmbed
from effformer.site import NormRule, Site
from effformer.values import Chance, Count, Depth, NonNegative, Positive

from .base import Model, Preset, register_presets
from .layouts.flowformer import VISION

__all__ = ["PRESETS", "FlowformerVision"]


class FlowformerVision(Model):
    """Hierarchical classifier: stages of blocks, each on a quarter of the tokens of the one before.

    Every stage begins with a convolution of kernel = stride (the patch, then 2) and has the same
    number of heads. Only the FFN branches carry a layer scale; positions are learned and enter
    once, at the first stage.

    Args:
        config: the config; ``layers`` counts the blocks through all stages.
        name: preset name.

    Reference: Flowformer: Linearizing Transformers with Conservation Flows, 2022, arXiv 2202.06258.
    """

    FAMILY: ClassVar[str] = "flowformer-vision"
    ROLES: ClassVar[Mapping[str, str]] = {"patch_embed": "patch_embed", "head": "head"}
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (VISION,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(StackConfig):
        """Knobs of `FlowformerVision`, beside `StackConfig`.

        Attributes:
            dims: token width of each stage.
            depths: number of blocks of each stage.
            heads: number of heads in every stage.
            input_size: side of the square image.
            channels: channels of the image.
            patch: side of the first stage's patches.
            num_classes: number of classes.
            layer_scale: initial layer scale of the FFN branches.
            norm_eps: epsilon of every norm.
        """

        attn: BaseConfig = part("attention", Attention.Config(core=FLOW_PRESETS["vision"]))
        ffn: BaseConfig = part("ffn", MLP.Config(act="gelu"))
        block: BaseConfig = part("block", PreNorm.Config(scale_attn=False))
        drop_path: Chance = 0.2
        dims: tuple[Count, ...] = (96, 192, 384, 768)
        depths: tuple[Depth, ...] = (3, 3, 10, 3)
        heads: Count = 12
        input_size: Count = 224
        channels: Count = 3
        patch: Count = 4
        num_classes: Count = 1000
        layer_scale: NonNegative | None = 1e-5
        norm_eps: Positive = 1e-6

        def check(self) -> None:
            if len(self.dims) != len(self.depths) or not self.dims:
                raise ValueError(
                    f"dims {self.dims} and depths {self.depths} must have one entry per stage"
                )
            step = self.patch * 2 ** (len(self.dims) - 1)
            if self.input_size < step or self.input_size % step:
                raise ValueError(
                    f"input_size {self.input_size} is not divisible by {step}, "
                    f"patch {self.patch} times 2 per further stage"
                )

    def __init__(self, config: FlowformerVision.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        side = config.input_size // config.patch
        sites, embeds, channels = [], [], config.channels
        for stage, (dim, depth) in enumerate(zip(config.dims, config.depths, strict=True)):
            site = Site(
                dim=dim,
                heads=config.heads,
                layer_scale=config.layer_scale,
                norm=NormRule(eps=config.norm_eps),
                length=(side >> stage) ** 2,
                grid=(side >> stage, side >> stage),
            )
            embeds.append(PatchEmbed(channels, dim, 2 if stage else config.patch))
            sites += [site] * depth
            channels = dim
        self.patch_embed = nn.ModuleList(embeds)
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, config.dims[0]))
        self.blocks = build_stack(config, sites, Needs(), name=self.name)
        self.norm = make_norm(sites[-1])
        self.head = nn.Linear(config.dims[-1], config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of 0.02, zero biases."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        truncated_normal_linears(self)

    def forward(
        self,
        x: Tensor,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Class logits.

        Args:
            x: (B, C, S, S) images, S = ``config.input_size``.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, num_classes).

        Raises:
            ValueError: the shape does not fit.
        """
        logits: Tensor = self.head(self.features(x, ledger=ledger, tap=tap, complete=complete))
        return logits

    def features(
        self,
        x: Tensor,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Mean of the normed tokens of the last stage, (B, dims[-1]); arguments as in `forward`."""
        size, channels = self.config.input_size, self.config.channels
        shown = f"(B, {channels}, {size}, {size})"
        check_shape(x, shown, (None, channels, size, size), where=f"{self.name}: x")
        side, first = size // self.config.patch, 0
        for stage, depth in enumerate(self.config.depths):
            h = self.patch_embed[stage](x)
            if stage == 0:
                h = h + self.pos_embed
            ctx = Context(grid=(side, side), ledger=ledger, tap=tap, complete=complete)
            for block in self.blocks[first : first + depth]:
                h = block(h, ctx)
            x = h.transpose(1, 2).unflatten(2, (side, side))
            side, first = side // 2, first + depth
        pooled: Tensor = self.norm(h).mean(dim=1)
        return pooled

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        config, weight = self.config, self.head.weight
        shape = (batch, config.channels, config.input_size, config.input_size)
        return {
            "x": torch.randn(shape, dtype=weight.dtype, device=weight.device, generator=generator)
        }


PRESETS = {
    "flowformer-vision": Preset(
        config=FlowformerVision.Config(),
        params=43_311_304,
        source="ImageNet training script of the official code",
    ),
}
register_presets(FlowformerVision, PRESETS, paper="2202.06258")
