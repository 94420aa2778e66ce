"""Factorized attention: one small kernel per axis of a grid instead of one between all cells.

Shape legend: B batch, H heads, N cells, n cells along one axis, C width of a head, K width of
queries and keys, D token width, G stands for all axes of the grid.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.context import EMPTY, Context, check_context
from effformer.nn.norms import make_norm
from effformer.nn.positions import grid_axes
from effformer.nn.precision import exactly, widened
from effformer.places import rotate
from effformer.registry import Caps, attention
from effformer.site import Site
from effformer.values import Count, Positive

from .base import Mixer

__all__ = ["AxisKernel", "FactorizedChained", "FactorizedConfig", "FactorizedParallel", "along"]

ROPE_BASE = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorizedConfig(BaseConfig):
    """Knobs shared by the factorized mixers.

    Attributes:
        axes: number of grid axes; each has weights of its own. None means that of the model, and 2
            where the model leaves it open.
        head_dim: width C of a head; None means dim / heads.
        multiplier: width K of queries and keys over C.
        latent_dim: width of the summary of an axis that queries and keys are made of; None means
            dim.
        scale: factor of the kernels; None means 1 up to a multiplier of 4, and K^-1/2 above it.
        rope: queries and keys are turned by the coordinates of their cells.
        rope_scale: coordinates are multiplied by this before they become angles.
        norm: statistics of the mixed values over the whole grid, of every channel ("instance",
            IFactFormer) or of every head with unbiased variance ("head", FactFormer).
        eps: epsilon of this norm; None means 1e-5 for "instance" and 1e-8 for "head".
        gain: initial size of queries and keys over that of Xavier. The official 0.02 makes kernels
            whose values vanish beside ``eps``; they take long to grow.
    """

    axes: Count | None = None
    head_dim: Count | None = None
    multiplier: Count = 3
    latent_dim: Count | None = None
    scale: Positive | None = None
    rope: bool = True
    rope_scale: Positive = 64.0
    norm: Literal["instance", "head"] = "instance"
    eps: Positive | None = None
    gain: Positive = 0.02


class AxisKernel(nn.Module):
    """How the cells of one axis attend to each other, seen through the mean over all other axes.

    ``(a, b) = W1 norm(P z) + c1``, ``p = W2 (gelu(a) * b) + c2``, ``q, k = Wq p, Wk p``, and for
    every head ``K_ij = s (R(t_i) q_i) . (R(t_j) k_j)`` with the rotation R by the coordinate t.
    There is no softmax: a row does not sum to one.

    Args:
        config: the knobs.
        site: the place in the model.
        head_dim: width C of a head.
    """

    def __init__(self, config: FactorizedConfig, site: Site, head_dim: int) -> None:
        super().__init__()
        self.config, self.heads = config, site.heads
        self.width = config.multiplier * head_dim
        if config.rope and self.width % 2:
            raise ValueError(
                f"{site.path or 'factorized'}: rotary embedding turns pairs, but head_dim "
                f"{head_dim} times multiplier {config.multiplier} is odd; use an even one, or rope=False"
            )
        latent = config.latent_dim or site.dim
        self.proj = nn.Linear(site.dim, site.dim, bias=False)
        self.norm = make_norm(site, affine=True)
        self.fc1 = nn.Linear(site.dim, 2 * site.dim)
        self.fc2 = nn.Linear(site.dim, latent)
        self.qk = nn.Linear(latent, 2 * site.heads * self.width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries and keys start at ``config.gain`` times Xavier's uniform values."""
        for half in self.qk.weight.chunk(2):
            nn.init.xavier_uniform_(half, gain=self.config.gain)

    def summary(self, z: Tensor) -> Tensor:
        """What queries and keys are made of: z (B, n, D) -> (B, n, latent)."""
        value, factor = self.fc1(self.norm(self.proj(z))).chunk(2, dim=-1)
        return self.fc2(F.gelu(value) * factor)

    def forward(self, z: Tensor, coords: Tensor) -> Tensor:
        """Kernels (B, H, n, n), in float32 at least.

        Args:
            z: (B, n, D) means over the other axes.
            coords: (n,) coordinates along this axis.
        """
        qk = widened(self.qk(self.summary(z)))
        q, k = qk.unflatten(-1, (2, self.heads, self.width)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.config.rope:
            cos, sin = self._tables(coords)
            q = rotate(q, cos, sin, interleaved=False)
            k = rotate(k, cos, sin, interleaved=False)
        with exactly(z):
            kernel = q @ k.transpose(-2, -1)
        scale = self._scale
        return kernel if scale == 1.0 else kernel * scale

    def _tables(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        half = self.width // 2
        steps = torch.arange(half, device=coords.device, dtype=coords.dtype) / half
        angles = (coords * self.config.rope_scale)[:, None] / ROPE_BASE**steps
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    @property
    def _scale(self) -> float:
        if self.config.scale is not None:
            return self.config.scale
        return 1.0 if self.config.multiplier <= 4 else self.width**-0.5

    def macs(self, n: int) -> int:
        """Multiply-adds for the n cells of the axis."""
        dim, latent = self.proj.in_features, self.fc2.out_features
        both = self.heads * self.width
        return n * (3 * dim * dim + dim * latent + 2 * latent * both + n * both)


class _Factorized(Mixer):
    """What the two forms share: kernels of all axes, the norm over the grid, the output network.

    Args:
        config: the knobs.
        site: the place in the model.
        side_by_side: the mixed values of all axes stand side by side in every head.
    """

    def __init__(self, config: FactorizedConfig, site: Site, *, side_by_side: bool) -> None:
        super().__init__(config, site)
        where = site.path or "factorized"
        there = None if site.grid is None else len(site.grid)
        axes = config.axes or there or 2
        if axes != (there or axes):
            raise ValueError(
                f"{where}: axes={axes}, but the grid of this model has {there}; leave axes out"
            )
        if config.head_dim is None and site.dim % site.heads:
            raise ValueError(
                f"{where}: width {site.dim} is not divisible by {site.heads} heads; "
                "change heads or give head_dim"
            )
        self.heads = site.heads
        self.head_dim = config.head_dim or site.dim // site.heads
        self.slots = axes if side_by_side else 1
        self.eps = config.eps or (1e-5 if config.norm == "instance" else 1e-8)
        inner, out = self.heads * self.head_dim, site.out_dim or site.dim
        self.v = nn.Linear(site.dim, inner, bias=False)
        self.pool = nn.Linear(site.dim, site.dim, bias=False)
        self.axes = nn.ModuleList(AxisKernel(config, site, self.head_dim) for _ in range(axes))
        self.fc1 = nn.Linear(inner * self.slots, out, bias=False)
        self.fc2 = nn.Linear(out, out, bias=False)
        self.drop = nn.Dropout(site.dropout)

    @abstractmethod
    def mix(self, kernels: Sequence[Tensor], v: Tensor) -> Tensor:
        """Apply one kernel (B, H, n, n) per axis to v (B, H, G, C) -> (B, H, G, slots C)."""

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        check_context(ctx, self.caps, "attention", self.site.path or "factorized", x)
        grid = self._grid(x, ctx)
        kernels = self._kernels(x, grid, ctx)
        v = widened(self.v(x)).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        v = self._tapped("v", v, ctx)
        with exactly(x):  # sums over K times n products without a bound
            mixed = self.mix(kernels, v.unflatten(2, grid))
        mixed = self._tapped("mixed", mixed.flatten(2, -2), ctx)
        normed = self._tapped("normed", self._normed(mixed), ctx)
        h = normed.transpose(1, 2).flatten(2).to(x.dtype)
        return self.drop(self.fc2(F.gelu(self.fc1(h))))

    def _kernels(self, x: Tensor, grid: tuple[int, ...], ctx: Context) -> list[Tensor]:
        cells, kernels = x.unflatten(1, grid), []
        coords = self._coords(x, grid, ctx)
        for a, axis in enumerate(self.axes):
            others = [1 + b for b in range(len(grid)) if b != a]
            # a bias-free linear map and a mean commute: project n summaries instead of N cells
            z = self.pool(cells.mean(dim=others) if others else cells)
            kernels.append(self._tapped(f"kernel.{a}", axis(z, coords[a]), ctx))
        return kernels

    def _normed(self, mixed: Tensor) -> Tensor:
        """Standardise (B, H, N, slots C) over the grid; this bounds what kernels without softmax
        do.
        """
        whole = self.config.norm == "head"
        dims = (2, 3) if whole else (2,)
        centred = mixed - mixed.mean(dim=dims, keepdim=True)
        # two means: reducing a middle axis, var_mean is several times slower on a CPU
        var = centred.square().mean(dim=dims, keepdim=True)
        if whole:
            count = mixed.shape[2] * mixed.shape[3]
            others: int = torch.sym_max(count - 1, 1)  # type: ignore[assignment]
            var = var * count / others
        return centred * torch.rsqrt(var + self.eps)

    def _coords(self, x: Tensor, grid: tuple[int, ...], ctx: Context) -> list[Tensor]:
        """Real coordinates of every axis; without given ones from 0 to 1, both ends included."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if ctx.positions is None:
            steps = [torch.arange(n, device=x.device, dtype=dtype) for n in grid]
            return [s / s[-1:].clamp(min=1.0) for s in steps]
        if tuple(ctx.positions.shape[1:]) != (x.shape[1], len(grid)):
            raise ValueError(
                f"{self.site.path or 'factorized'}: ctx.positions has shape "
                f"{tuple(ctx.positions.shape)}, but {x.shape[1]} tokens on the grid {tuple(grid)} "
                f"have {len(grid)} coordinates each, (1, {x.shape[1]}, {len(grid)})"
            )
        return grid_axes(ctx.positions.to(device=x.device, dtype=dtype), grid)

    def _grid(self, x: Tensor, ctx: Context) -> tuple[int, ...]:
        where, axes = self.site.path or "factorized", len(self.axes)
        if ctx.grid is None:
            raise CapabilityError(f"{where}: needs ctx.grid with {axes} axes, got None")
        if len(ctx.grid) != axes:
            raise CapabilityError(
                f"{where}: built for grids of {axes} axes, but the grid is {tuple(ctx.grid)}; "
                f"build it with axes={len(ctx.grid)}"
            )
        front = x.shape[1] - prod(ctx.grid)
        if front > 0:
            raise CapabilityError(
                f"{where}: {front} tokens stand in front of the grid (class token, registers), but "
                "kernels along axes reach cells only; build the model without them, and pool by "
                "'avg'"
            )
        if front < 0:
            raise ValueError(f"{where}: grid {tuple(ctx.grid)} does not fit {x.shape[1]} tokens")
        return ctx.grid

    def _tapped(self, name: str, value: Tensor, ctx: Context) -> Tensor:
        return value if ctx.tap is None else ctx.tap(f"{self.site.path}.{name}", value)

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        if grid is None or len(grid) != len(self.axes) or prod(grid) != n:
            raise ValueError(
                f"{self.site.path or 'factorized'}: the work depends on the shape of the grid; "
                f"macs({n}, grid=...) needs {len(self.axes)} axes with {n} cells, got {grid}"
            )
        inner, out = self.heads * self.head_dim, self.fc2.out_features
        dim = self.site.dim
        kernels = dim * dim * sum(grid)
        for axis, size in zip(self.axes, grid, strict=True):
            assert isinstance(axis, AxisKernel)
            kernels += axis.macs(size)
        applied = n * inner * sum(grid)
        return kernels + applied + n * (dim * inner + inner * self.slots * out + out * out)


_CAPS = Caps(axes="w", cost="n^1.5")


@attention.register("factorized-parallel", caps=_CAPS, paper="2412.18840")
class FactorizedParallel(_Factorized):
    """Factorized attention, all axes side by side: ``W2 gelu(W1 norm([K_x v | K_y v | K_z v]))``.

    Every axis has one n x n kernel per head, made from the mean over all other axes (`AxisKernel`),
    and reads the same values; the results stand side by side in each head. Coordinates come from
    ``ctx.positions``, or run from 0 to 1 on every axis. Taps: ``<path>.v``, ``.kernel.<axis>``,
    ``.mixed`` and ``.normed``.

    No weight of a quadrature enters a kernel: on a grid of another resolution its product grows
    with the number of cells, and the norm alone makes up for that. What was learned on one grid
    therefore holds on another only approximately.

    Differs from the paper: the two linear maps in front of an axis run behind the mean, where they
    cost n instead of N; a single cell has zero variance and gets zero instead of an error.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        ValueError: a width does not fit the heads.
        CapabilityError: at call, a grid with another number of axes, tokens in front of the grid,
            or a `Context` field that the part cannot honour.

    Reference: Implicit factorized transformer approach to fast prediction of turbulent channel
    flows, 2024, arXiv 2412.18840 (IFactFormer-m).
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FactorizedConfig):
        """Knobs of `FactorizedParallel`; see `FactorizedConfig`."""

    def __init__(self, config: FactorizedParallel.Config, site: Site) -> None:
        super().__init__(config, site, side_by_side=True)

    def mix(self, kernels: Sequence[Tensor], v: Tensor) -> Tensor:
        return torch.cat([along(k, v, axis=a) for a, k in enumerate(kernels)], dim=-1)


@attention.register("factorized-chained", caps=_CAPS, paper="2305.17560")
class FactorizedChained(_Factorized):
    """Factorized attention, one axis after the other: ``W2 gelu(W1 norm(K_z K_y K_x v))``.

    Otherwise as `FactorizedParallel`. The order of the axes does not matter. FactFormer uses
    ``norm="head"`` and a multiplier of 2 on planes; IFactFormer-o the defaults.

    Differs from the paper: the two linear maps in front of an axis run behind the mean, where they
    cost n instead of N.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        ValueError: a width does not fit the heads.
        CapabilityError: at call, a grid with another number of axes, tokens in front of the grid,
            or a `Context` field that the part cannot honour.

    Reference: Scalable Transformer for PDE Surrogate Modeling, 2023, arXiv 2305.17560.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FactorizedConfig):
        """Knobs of `FactorizedChained`; see `FactorizedConfig`."""

    def __init__(self, config: FactorizedChained.Config, site: Site) -> None:
        super().__init__(config, site, side_by_side=False)

    def mix(self, kernels: Sequence[Tensor], v: Tensor) -> Tensor:
        for a, kernel in enumerate(kernels):
            v = along(kernel, v, axis=a)
        return v


def along(kernel: Tensor, v: Tensor, *, axis: int) -> Tensor:
    """``out[.. i ..] = sum_j kernel[i, j] v[.. j ..]`` along one axis of a grid.

    Args:
        kernel: (B, H, n, n).
        v: (B, H, G, C).
        axis: index of the axis among those of the grid.
    """
    moved = v.movedim(2 + axis, 2)
    mixed = kernel @ moved.flatten(3)
    return mixed.unflatten(3, moved.shape[3:]).movedim(2, 2 + axis)
