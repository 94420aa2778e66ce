"""Where the cells of a grid stand: one coordinate per axis and token."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cell_counts", "extended_positions", "grid_axes", "grid_positions"]


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


def extended_positions(
    grid: tuple[int, int, int],
    streams: int = 1,
    *,
    base: tuple[int, int] | None = None,
    axis: Literal["h", "w"] = "h",
    order: Literal["paper", "release"] = "paper",
    device: torch.device | None = None,
) -> Tensor:
    """Coordinates of several videos whose tokens are not aligned, one behind the other: all share their
    times, and in space each goes on where the one before it ends (ERoPE).

    Args:
        grid: frames T, rows H and columns W of each.
        streams: number of videos.
        base: rows and columns whose extent all sizes of the grid are stretched to (aspect kept, the
            other axis centred); None: cells are counted.
        axis: they go on along the rows ("h") or the columns ("w").
        order: "paper": a token stands where it belongs. "release": tokens of all videos, one behind
            the other, get the places of the extended grid row by row, as the released code of
            GenCompositor does, so that frames 0 and 1 of the first share a time.
        device: of the result.

    Returns:
        (1, streams * T * H * W, 3): frame, row, column.

    Reference: GenCompositor: Generative Video Compositing with Diffusion Transformer, 2025, arXiv
    2509.02460.
    """
    (frames, *size), along = grid, "hw".index(axis)
    long = [n * (streams if i == along else 1) for i, n in enumerate(size)]
    extent = None if base is None else [
        n * (streams if i == along else 1) for i, n in enumerate(base)
    ]  # fmt: skip
    axes = [torch.arange(frames, device=device, dtype=torch.float32)]
    for n, (start, stop) in zip(long, _crop(long, extent or long), strict=True):
        steps = torch.arange(n, device=device, dtype=torch.float64)
        axes.append((start + (stop - start) * steps / n).float())
    places = grid_positions(axes)
    if order == "release":
        return places
    cells = places[0].unflatten(0, (frames, *long)).unflatten(1 + along, (streams, size[along]))
    return cells.movedim(1 + along, 0).flatten(0, -2)[None]


def _crop(size: Sequence[int], base: Sequence[int]) -> list[tuple[int, int]]:
    """First and last coordinate along both axes of a grid that is resized to fit into a base one, and
    centred in it.
    """
    (rows, columns), (tall, wide) = size, base
    if rows / columns > tall / wide:
        fitted = [tall, round(tall / rows * columns)]
    else:
        fitted = [round(wide / columns * rows), wide]
    starts = [round((whole - part) / 2) for whole, part in zip(base, fitted, strict=True)]
    return [(start, start + part) for start, part in zip(starts, fitted, strict=True)]
