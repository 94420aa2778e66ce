"""Where the cells of a grid stand: one coordinate per axis and token."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cell_counts", "grid_axes", "grid_positions"]


def grid_positions(axes: Sequence[Tensor], *, front: int = 0) -> Tensor:
    """Coordinates of every cell, row-major, behind ``front`` tokens that stand at the origin.

    Args:
        axes: (n,) coordinates along every axis of the grid.
        front: number of tokens before the grid (class token, registers).

    Returns:
        (1, front + prod(n), axes).
    """
    sizes = [axis.shape[0] for axis in axes]  # len() would fix a size that a graph leaves open
    places = [
        axis.view([-1 if i == j else 1 for j in range(len(axes))]).expand(sizes).flatten()
        for i, axis in enumerate(axes)
    ]
    return F.pad(torch.stack(places, dim=-1), (0, 0, front, 0))[None]


def cell_counts(
    grid: Sequence[int], *, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Cells counted from 0 along every axis of a grid."""
    return [torch.arange(size, device=device, dtype=dtype) for size in grid]


def grid_axes(positions: Tensor, grid: Sequence[int]) -> list[Tensor]:
    """Coordinates (n,) along every axis of a grid, of positions (B or 1, N, axes) that are those of
    `grid_positions`, in every sample the same.
    """
    cells = positions[0, positions.shape[1] - prod(grid) :].unflatten(0, tuple(grid))
    picked = []
    for i in range(len(grid)):
        line = cells[..., i]
        for axis in reversed(range(len(grid))):
            line = line if axis == i else line.select(axis, 0)
        picked.append(line)
    return picked
