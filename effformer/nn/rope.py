"""Rotary position embedding (RoPE): tables for tokens with coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from effformer.config import Config as BaseConfig
from effformer.places import Rope
from effformer.values import Count, Even, Positive, Real

from .positions import grid_positions

__all__ = ["GridRope"]


class GridRope(nn.Module):
    """Rotary tables for tokens with one, two or three coordinates.

    A head of width K has K / 2 angles per token. At coordinates (a, b) of a grid of rows and
    columns::

        axial, centered    [a w_0 ... a w_(K/4-1) | b w_0 ... b w_(K/4-1)],  w_i = T^(-4 i / K)
        mixed              a u_i + b v_i,  u and v learned for every layer and head

    "axial" counts cells, "centered" maps the grid to [-1, 1] and multiplies the w_i by 2 pi
    (DINOv3), "mixed" counts cells. On one axis all K channels belong to it; on three (time, rows,
    columns) rows and columns have 2 floor(K / 6) channels each, and time the rest; an axis of k
    channels has ``w_i = T^(-2 i / k)``. ``widths`` gives other numbers of channels (FLUX: 16, 56, 56).
    Tokens at the origin do not turn.

    Args:
        config: the knobs.
        head_dim: width K of a head.
        heads: number of heads.
        depth: number of layers.
        axes: number of coordinates.

    Raises:
        ValueError: the head width does not divide into pairs of channels for every axis.

    Reference: RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv 2104.09864
    (one axis); Rotary Position Embedding for Vision Transformer, 2024, arXiv 2403.13298 (axial and
    mixed); DINOv3, 2025, arXiv 2508.10104 (centered); Wan: Open and Advanced Large-Scale Video
    Generative Models, 2025, arXiv 2503.20314 (three axes).
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `GridRope`.

        Attributes:
            kind: see `GridRope`.
            temperature: T, or, for "mixed", the base of the initial frequencies.
            first: which coordinate is a.
            offset: added to every coordinate that counts cells.
            reference: grid on which the frequencies were learned; coordinates of other grids are
                scaled to it ("axial" only).
            interleaved: pairs are (0, 1), (2, 3), ... instead of (0, K/2), (1, K/2 + 1), ...
            widths: channels of every coordinate, K together; None: see `GridRope`.
        """

        kind: Literal["axial", "centered", "mixed"] = "axial"
        temperature: Positive = 100.0
        first: Literal["row", "column"] = "row"
        offset: Real = 0.0
        reference: tuple[Count, Count] | None = None
        interleaved: bool = True
        widths: tuple[Even, ...] | None = None

        def check(self) -> None:
            if self.kind == "mixed" and self.widths is not None:
                raise ValueError(
                    "rope: kind 'mixed' turns all pairs by all coordinates; use widths=None"
                )
            if self.kind == "mixed" and not self.interleaved:
                raise ValueError("rope: kind 'mixed' has interleaved pairs; use interleaved=True")
            if self.kind != "axial" and self.reference is not None:
                raise ValueError(f"rope: kind {self.kind!r} has no reference grid")

    def __init__(
        self, config: GridRope.Config, head_dim: int, *, heads: int, depth: int, axes: int = 2
    ) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.widths = config.widths or _widths(head_dim, axes)
        if config.widths is not None and (len(self.widths), sum(self.widths)) != (axes, head_dim):
            raise ValueError(
                f"rope: widths {config.widths} are those of {len(config.widths)} coordinates and of heads "
                f"of width {sum(config.widths)}, but here are {axes} and heads of width {head_dim}"
            )
        if config.reference is not None and axes != 2:
            raise ValueError(f"rope: a reference grid has two axes, not {axes}; use reference=None")
        if any(width < 2 or width % 2 for width in self.widths):
            raise ValueError(
                f"rope: heads of width {head_dim}; the width must be divisible by {2 * axes}"
                if axes < 3
                else f"rope: heads of width {head_dim}; it must be even and at least 6"
            )
        if config.kind == "mixed":
            if axes != 2:
                raise ValueError(f"rope: kind 'mixed' has two axes, not {axes}; use 'axial'")
            self.freqs = nn.Parameter(torch.empty(2, depth, heads, head_dim // 2))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Frequencies T^(-4 i / K) along two orthogonal directions, turned at random per head."""
        _, depth, heads, _ = self.freqs.shape
        turn = 2 * math.pi * torch.rand(depth, heads, 1, device=self.freqs.device)
        turns = torch.cat([turn, turn + math.pi / 2], dim=-1)[..., None]
        size = self._frequencies(self.head_dim // 2, self.freqs.device)
        with torch.no_grad():
            self.freqs[0] = (turns.cos() * size).flatten(-2)
            self.freqs[1] = (turns.sin() * size).flatten(-2)

    def positions(
        self, grid: Sequence[int], *, front: int = 0, device: torch.device | None = None
    ) -> Tensor:
        """Coordinates (1, front + cells, axes) of ``front`` tokens without a place, then of the cells
        of a grid, row-major.
        """
        config, axes = self.config, []
        for i, size in enumerate(grid):
            x = torch.arange(size, device=device, dtype=torch.float32) + config.offset
            if config.kind == "centered":
                x = 2 * ((x + 0.5) / size) - 1
            elif config.reference is not None:
                x = x / size * config.reference[i]
            axes.append(x)
        return grid_positions(axes, front=front)

    def forward(self, positions: Tensor, *, like: Tensor) -> tuple[Rope, ...]:
        """Tables for tokens as they stand: on a grid, in a packed row, at some time of a stream.

        Args:
            positions: (B or 1, N, axes) coordinates.
            like: tensor whose device and dtype the tables get.

        Returns:
            One `Rope` for all layers, or one per layer ("mixed"). Its tables are (N, K), or (B, 1,
            N, K) of samples that differ; "mixed" has H in front of N.
        """
        places = positions.to(like.device).float()
        if self.config.first == "column":
            places = places.flip(-1)
        if self.config.kind == "mixed":
            u, v = self.freqs.float()[:, :, None, :, None]
            angles = places[..., None, :, :1] * u + places[..., None, :, 1:] * v
        else:
            lines = zip(places.unbind(-1), self.widths, strict=True)
            angles = torch.cat(
                [x[..., None] * self._frequencies(width, like.device) for x, width in lines], dim=-1
            )[None, :, None]
        cos, sin = (self._spread(t).to(like.dtype) for t in (angles.cos(), angles.sin()))
        pairs = zip(cos, sin, strict=True)
        return tuple(
            Rope(_shared(c), _shared(s), interleaved=self.config.interleaved) for c, s in pairs
        )

    def _frequencies(self, width: int, device: torch.device) -> Tensor:
        """Of an axis with ``width`` channels."""
        half = width // 2
        steps = torch.arange(half, device=device, dtype=torch.float32) / half
        turn = 2 * math.pi if self.config.kind == "centered" else 1.0
        return turn / self.config.temperature**steps

    def _spread(self, values: Tensor) -> Tensor:
        """One value per pair to one per channel."""
        if self.config.interleaved:
            return values.repeat_interleave(2, dim=-1)
        return torch.cat([values, values], dim=-1)


def _widths(head_dim: int, axes: int) -> tuple[int, ...]:
    """Channels of every axis."""
    if axes < 3:
        return (head_dim // axes,) * axes if head_dim % axes == 0 else (0,)
    space = 2 * (head_dim // 6)
    return (head_dim - 2 * space, space, space)


def _shared(table: Tensor) -> Tensor:
    """A table (B, H, N, K) without axes of length 1 in front, as far as all samples share it."""
    if table.shape[0] != 1:
        return table
    return table[0, 0] if table.shape[1] == 1 else table[0]
