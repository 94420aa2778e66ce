"""Flowformer as a classifier of multivariate time series.

Reference: Flowformer: Linearizing Transformers with Conservation Flows, 2022, arXiv 2202.06258.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from effformer.attention import Attention
from effformer.attention.flow import FLOW_PRESETS
from effformer.blocks import BackboneConfig, Needs, PostNorm, build_stack
from effformer.checks import check_mask, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Packing, Tap, explained
from effformer.ffn import MLP
from effformer.nn.norms import make_norm
from effformer.nn.text import sinusoids
from effformer.site import NormRule, Site
from effformer.values import Chance, Count

from .base import Model, Preset, register_presets

__all__ = ["PRESETS", "FlowformerSeries"]


class FlowformerSeries(Model):
    """Classifier of time series: ``head(flatten(blocks(sqrt(D) W x + positions)))``.

    Post-norm blocks; the head reads all time steps, so the length is fixed, and shorter series are
    padded and masked.

    Differs from the paper: positions are fixed sinusoids; the 1x1 convolutions of the published
    code are written as the linear layers that they are.

    Args:
        config: the config.
        name: preset name.

    Reference: Flowformer: Linearizing Transformers with Conservation Flows, 2022, arXiv 2202.06258.
    """

    FAMILY: ClassVar[str] = "flowformer-series"
    ROLES: ClassVar[Mapping[str, str]] = {"embed": "patch_embed", "head": "head"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `FlowformerSeries`, beside `BackboneConfig`.

        Attributes:
            channels: variables per time step.
            length: number of time steps.
            num_classes: number of classes.
        """

        attn: BaseConfig = part("attention", Attention.Config(core=FLOW_PRESETS["time-series"]))
        ffn: BaseConfig = part("ffn", MLP.Config(hidden=512, act="gelu"))
        block: BaseConfig = part("block", PostNorm.Config())
        dropout: Chance = 0.1
        channels: Count = 3
        length: Count = 1751
        num_classes: Count = 4

    def __init__(self, config: FlowformerSeries.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        site = Site(
            dim=config.dim, heads=config.heads, norm=NormRule(eps=1e-5), length=config.length
        )
        self.embed = nn.Linear(config.channels, config.dim)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = build_stack(config, site, Needs(mask="key"), name=self.name)
        self.norm = make_norm(site)
        self.head = nn.Linear(config.dim * config.length, config.num_classes)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        packed: bool = False,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Class logits.

        Args:
            x: (B, length, channels) series.
            mask: (B, length) bool, True = real time step.
            packed: run the blocks on the real time steps only, with the same result. Their number
                depends on the data; export the padded form.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, num_classes).

        Raises:
            ValueError: a shape does not fit.
            CapabilityError: ``packed``, but a part cannot run packed.
        """
        config = self.config
        sizes = (None, config.length, config.channels)
        check_shape(x, f"(B, {sizes[1]}, {sizes[2]})", sizes, where=f"{self.name}: x")
        if mask is not None:
            check_mask(mask, where=f"{self.name}: mask")
            check_shape(mask, "(B, length)", tuple(x.shape[:2]), where=f"{self.name}: mask")
        steps = torch.arange(config.length, device=x.device)
        h = self.embed(x) * config.dim**0.5 + sinusoids(steps, config.dim).to(x.dtype)
        ctx = Context(mask=mask, ledger=ledger, tap=tap, complete=complete)
        if packed and mask is not None:
            packing = Packing.from_mask(mask)
            h, ctx = packing.pack(h), replace(ctx, mask=None, packing=packing)
        h = self.drop(h)
        for block in self.blocks:
            h = block(h, ctx)
        h = self.norm(h)
        if ctx.packing is not None:
            h = ctx.packing.unpack(h)
        elif mask is not None:
            h = h * mask.unsqueeze(-1)
        logits: Tensor = self.head(h.flatten(1))
        return logits

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        shape, weight = (batch, self.config.length, self.config.channels), self.embed.weight
        return {
            "x": torch.randn(shape, dtype=weight.dtype, device=weight.device, generator=generator)
        }


PRESETS = {
    "flowformer-series": Preset(
        config=FlowformerSeries.Config(dim=512, depth=3, heads=8),
        source="UEA classification of the official code; channels, length and classes are "
        "EthanolConcentration's",
    ),
}
register_presets(FlowformerSeries, PRESETS, paper="2202.06258")
