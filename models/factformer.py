"""Operators on grids made of factorized attention: IFactFormer and FactFormer.

References: Implicit factorized transformer approach to fast prediction of turbulent channel flows,
2024, arXiv 2412.18840; Scalable Transformer for PDE Surrogate Modeling, 2023, arXiv 2305.17560.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.attention import FactorizedChained, FactorizedParallel
from effformer.blocks import BackboneConfig, Iterate, Needs, PreNorm, build_stack
from effformer.checks import check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap, explained
from effformer.layout import Layout
from effformer.nn.embeddings import FourierPositions
from effformer.nn.norms import LayerNorm
from effformer.nn.positions import grid_positions
from effformer.site import NormRule, Site
from effformer.values import Count, Positive

from .base import Model, Preset, register_presets
from .layouts.factformer import IFACTFORMER

__all__ = ["PRESETS", "FactFormer", "GridOperator", "GridOperatorConfig", "IFactFormer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GridOperatorConfig(BackboneConfig):
    """Knobs of `GridOperator`, beside `BackboneConfig`.

    Attributes:
        channels: fields in; dim / 2 must be divisible by them.
        out_channels: fields out; None means as many as come in.
        window: frames in.
        grid: cells of every axis in training. It fixes the number of axes; inputs may have others.
        lengths: length of the domain along every axis; coordinates run from 0 to it, both ends
            included. None means 1.
        increment: the network predicts what is added to the last frame.
    """

    ffn: BaseConfig | None = part("ffn", optional=True)
    channels: Count = 3
    out_channels: Count | None = None
    window: Count = 1
    grid: tuple[Count, ...] = (32, 32, 32)
    lengths: tuple[Positive, ...] | None = None
    increment: bool = False

    def check(self) -> None:
        if not self.grid:
            raise ValueError("grid: give the number of cells along every axis, got none")
        if self.dim % (2 * self.channels):
            raise ValueError(
                f"dim / 2 must be divisible by channels, got dim={self.dim}, channels={self.channels}"
            )
        if self.lengths is not None and len(self.lengths) != len(self.grid):
            raise ValueError(f"lengths: one for every axis of grid {self.grid}, got {self.lengths}")
        if self.increment and self.fields != self.channels:
            raise ValueError(
                f"increment: {self.fields} fields cannot be added to {self.channels} channels"
            )

    @property
    def fields(self) -> int:
        """Fields out."""
        return self.channels if self.out_channels is None else self.out_channels


class GridOperator(Model):
    """What both families share: lifted frames, blocks over the grid, a head, rollout.

    ``h = W * gelu(lift(u))`` over the window of frames, then for every layer ``h = block(h +
    positions)`` with positions of its own.

    Args:
        config: the config.
        name: preset name.
    """

    ROLES: ClassVar[Mapping[str, str]] = {
        "lift": "patch_embed",
        "frames": "patch_embed",
        "positions": "patch_embed",
        "expand": "head",
        "mlp": "head",
        "head": "head",
    }

    def __init__(self, config: GridOperatorConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        half, axes = config.dim // 2, len(config.grid)
        site = Site(
            dim=config.dim, heads=config.heads, grid=(None,) * axes, norm=NormRule(eps=1e-5)
        )
        self.lift = nn.Conv2d(config.channels, half, 1, groups=config.channels)
        self.frames = nn.Conv2d(half, config.dim, (config.window, 1), bias=False)
        self.positions = nn.ModuleList(
            FourierPositions(axes, config.dim) for _ in range(config.depth)
        )
        self.blocks = build_stack(config, site, Needs(), name=self.name)

    @abstractmethod
    def predict(self, h: Tensor) -> Tensor:
        """The head: (B, N, D) -> (B, S, C, N), S frames."""

    def forward(
        self,
        x: Tensor,
        coords: Sequence[Tensor] | None = None,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict the next frames.

        Args:
            x: (B, window, channels, n_1, n_2, ...) frames, the latest last; any number of cells.
            coords: one (n,) tensor per axis; None means from 0 to ``lengths``. Their unit is that
                of training: stretching them turns all rotary angles.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, frames, fields, n_1, n_2, ...).

        Raises:
            ValueError: a shape does not fit.
        """
        config = self.config
        sizes = (None, config.window, config.channels, *[None] * len(config.grid))
        shown = ", ".join(f"n_{a + 1}" for a in range(len(config.grid)))
        expected = f"(B, {config.window}, {config.channels}, {shown})"
        check_shape(x, expected, sizes, where=f"{self.name}: x")
        grid = tuple(x.shape[3:])
        if not torch.compiler.is_exporting() and prod(grid) < 2:
            raise ValueError(
                f"{self.name}: x: a grid of one cell has no variation that could be normalised; give "
                "at least 2 cells"
            )
        places = self.coordinates(grid, like=x) if coords is None else tuple(coords)
        given = [tuple(c.shape) for c in places]
        if given != [(n,) for n in grid]:
            raise ValueError(
                f"{self.name}: coords: expected one (n,) tensor for every axis of {grid}, got {given}"
            )
        cells = grid_positions(places)[0]
        h = self.frames(F.gelu(self.lift(x.transpose(1, 2).flatten(3))))
        h = h.squeeze(2).transpose(1, 2)
        ctx = Context(grid=grid, positions=cells[None], ledger=ledger, tap=tap, complete=complete)
        for position, block in zip(self.positions, self.blocks, strict=True):
            h = block(h + position(cells.to(h.dtype)), ctx)
        y = self.predict(h).unflatten(-1, grid)
        return x[:, -1:] + y if config.increment else y

    def coordinates(self, grid: Sequence[int], *, like: Tensor) -> tuple[Tensor, ...]:
        """Coordinates of a grid over the domain of training, both ends included."""
        places = []
        for n, length in zip(grid, self.config.lengths or [1.0] * len(grid), strict=True):
            dtype = torch.promote_types(like.dtype, torch.float32)
            steps = torch.arange(n, device=like.device, dtype=dtype)
            places.append(steps * (length / steps[-1:].clamp(min=1)))
        return tuple(places)

    def rollout(self, x: Tensor, steps: int, coords: Sequence[Tensor] | None = None) -> Tensor:
        """Predict ``steps`` frames, each from those before it.

        Args:
            x: (B, window, channels, n_1, n_2, ...) frames.
            steps: number of frames, at least 1.
            coords: see `forward`.

        Returns:
            (B, steps, channels, n_1, n_2, ...).

        Raises:
            ValueError: the model predicts other fields than it reads, or no step is asked for.
        """
        if self.config.fields != self.config.channels:
            raise ValueError(
                f"{self.name}: rollout feeds predictions back, but the model reads "
                f"{self.config.channels} fields and predicts {self.config.fields}"
            )
        if steps < 1:
            raise ValueError(f"{self.name}: rollout: steps must be at least 1, got {steps}")
        made = [self(x, coords)]
        while sum(y.shape[1] for y in made) < steps:
            x = torch.cat([x, made[-1]], dim=1)[:, -self.config.window :]
            made.append(self(x, coords))
        return torch.cat(made, dim=1)[:, :steps]

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        config, weight = self.config, self.lift.weight
        shape = (batch, config.window, config.channels, *config.grid)
        return {
            "x": torch.randn(shape, dtype=weight.dtype, device=weight.device, generator=generator)
        }

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        cells = {3 + a: f"cells_{a}" for a in range(len(self.config.grid))}
        return {"x": {0: "batch", **cells}}


class IFactFormer(GridOperator):
    """Next frame of a field on a grid: factorized attention iterated with shared weights.

    Args:
        config: the config.
        name: preset name.

    Differs from the paper: fields stand in front of the axes of the grid, as images have it; planes
    and lines work as well as space. The chained form (-o), which the published model cannot build,
    is a choice of ``attn``.

    Reference: Implicit factorized transformer approach to fast prediction of turbulent channel
    flows, 2024, arXiv 2412.18840.

    Example:
        >>> model = effformer.build_model("ifactformer-tiny")
        >>> model(torch.zeros(2, 1, 1, 12, 20)).shape
        torch.Size([2, 1, 1, 12, 20])
        >>> model.rollout(torch.zeros(2, 1, 1, 8, 8), steps=5).shape
        torch.Size([2, 5, 1, 8, 8])
    """

    FAMILY: ClassVar[str] = "ifactformer"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (IFACTFORMER,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(GridOperatorConfig):
        """Knobs of `IFactFormer`; see `GridOperatorConfig`."""

        attn: BaseConfig = part("attention", FactorizedParallel.Config(head_dim=96))
        block: BaseConfig = part("block", Iterate.Config(times=10, body=PreNorm.Config()))

    def __init__(self, config: IFactFormer.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        half = config.dim // 2
        self.head = nn.Sequential(
            nn.Linear(config.dim, half, bias=False), nn.GELU(), nn.Linear(half, config.fields)
        )

    def predict(self, h: Tensor) -> Tensor:
        return self.head(h).transpose(1, 2).unsqueeze(1)


class FactFormer(GridOperator):
    """Next frames of a field on a grid: factorized attention, then steps in a latent space.

    ``u = W h``; for every frame s ``u = u + mlp(norm(u + e_s))`` and ``frame_s = head(u)``, a group
    norm and three pointwise layers, the first of them in eight groups. One frame without a window
    is an operator between fields (Darcy flow).

    Differs from the paper: blocks keep the shape of the grid; the inner widths of the steps and of
    the head, which the paper does not give, are ours.

    Args:
        config: the config.
        name: preset name.

    Raises:
        ValueError: the latent width is not divisible by eight.

    Reference: Scalable Transformer for PDE Surrogate Modeling, 2023, arXiv 2305.17560.

    Example:
        >>> model = effformer.build_model("factformer-tiny")
        >>> model(torch.zeros(1, 4, 1, 12, 20)).shape
        torch.Size([1, 2, 1, 12, 20])
    """

    FAMILY: ClassVar[str] = "factformer"
    GROUPS: ClassVar[int] = 8

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(GridOperatorConfig):
        """Knobs of `FactFormer`, beside `GridOperatorConfig`.

        Attributes:
            steps: frames out.
            latent_ratio: width of the latent space over dim.
        """

        attn: BaseConfig = part(
            "attention", FactorizedChained.Config(head_dim=64, multiplier=2, norm="head")
        )
        steps: Count = 1
        latent_ratio: Positive = 1.0

        def check(self) -> None:
            if self.latent % FactFormer.GROUPS:
                raise ValueError(
                    f"the latent width {self.latent} (latent_ratio * dim) is not divisible by "
                    f"{FactFormer.GROUPS}"
                )

        @property
        def latent(self) -> int:
            """Width of the latent space."""
            return int(self.dim * self.latent_ratio)

    def __init__(self, config: FactFormer.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        latent, half = config.latent, config.latent // 2
        self.expand = nn.Linear(config.dim, latent, bias=False)
        self.times = nn.Parameter(torch.empty(config.steps, latent))
        nn.init.normal_(self.times, std=0.02)
        self.norm = LayerNorm(latent, eps=1e-5)
        self.mlp = nn.Sequential(nn.Linear(latent, latent), nn.GELU(), nn.Linear(latent, latent))
        self.head = nn.Sequential(
            nn.GroupNorm(self.GROUPS, latent),
            nn.Conv1d(latent, latent, 1, groups=self.GROUPS), nn.GELU(),
            nn.Conv1d(latent, half, 1), nn.GELU(),
            nn.Conv1d(half, config.fields, 1),
        )  # fmt: skip

    def predict(self, h: Tensor) -> Tensor:
        u, frames = self.expand(h), []
        for time in self.times.unbind(0):
            u = u + self.mlp(self.norm(u + time))
            frames.append(self.head(u.transpose(1, 2)))
        return torch.stack(frames, dim=1)


_PLANE = (64, 64)


def _fact(heads: int, multiplier: int, **more: Any) -> FactFormer.Config:
    attn = FactorizedChained.Config(head_dim=64, multiplier=multiplier, norm="head")
    return FactFormer.Config(dim=128, heads=heads, attn=attn, **more)


_TASKS = "arXiv 2305.17560 and its repository: dim, heads, head width, depth, multiplier"
_LEFT = "fields, window and frames, where not given, are placeholders of ours"
PRESETS: dict[str, Preset] = {
    "ifactformer-m": Preset(
        config=IFactFormer.Config(dim=96, depth=1, heads=5),
        params=1_163_331,
        source="arXiv 2412.18840, configuration of its repository, parameters counted there",
        summary="IFactFormer with parallel axes, as published for turbulent channel flow.",
    ),
    "ifactformer-o": Preset(
        config=IFactFormer.Config(
            dim=96, depth=1, heads=5, attn=FactorizedChained.Config(head_dim=96)
        ),
        params=1_071_171,
        source="arXiv 2412.18840, configuration of its repository, parameters counted there",
        summary="IFactFormer with chained axes.",
    ),
    "ifactformer-tiny": Preset(
        config=IFactFormer.Config(
            dim=48, depth=1, heads=3, channels=1, grid=(16, 16),
            attn=FactorizedParallel.Config(head_dim=16),
            block=Iterate.Config(times=4, body=PreNorm.Config()),
        ),
        summary="A size of ours on planes, for tests and examples.",
    ),
    "factformer-darcy2d": Preset(
        config=_fact(12, 2, depth=3, channels=1, grid=_PLANE), source=_TASKS,
        summary=f"FactFormer for steady Darcy flow on planes; {_LEFT}.",
    ),
    "factformer-ns2d": Preset(
        config=_fact(
            8, 2, depth=4, channels=1, grid=_PLANE, window=10, steps=16, latent_ratio=2.0
        ),
        source=_TASKS,
        summary="FactFormer for flows on planes: 16 frames from 10.",
    ),
    "factformer-ns3d": Preset(
        config=_fact(6, 3, depth=4, channels=4, grid=(32, 32, 32), latent_ratio=1.5),
        source=_TASKS,
        summary=f"FactFormer for turbulence in space; {_LEFT}.",
    ),
    "factformer-smoke3d": Preset(
        config=_fact(6, 3, depth=3, channels=4, grid=(32, 32, 32)), source=_TASKS,
        summary=f"FactFormer for buoyant smoke in space; {_LEFT}.",
    ),
    "factformer-tiny": Preset(
        config=FactFormer.Config(
            dim=32, depth=2, heads=2, channels=1, grid=(16, 16), window=4, steps=2,
            attn=FactorizedChained.Config(head_dim=16, multiplier=2, norm="head"),
        ),
        summary="A size of ours on planes, for tests and examples.",
    ),
}  # fmt: skip
for _family in (IFactFormer, FactFormer):
    _own = {n: p for n, p in PRESETS.items() if isinstance(p.config, _family.Config)}
    register_presets(_family, _own, paper="2412.18840" if _family is IFactFormer else "2305.17560")
