"""Values on one grid for another: linear interpolation and averages along an axis.

Both are written with operators that export with a grid of any size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["GridTable", "averages", "stretch", "stretch_grid"]


def stretch(x: Tensor, size: int, dim: int) -> Tensor:
    """Linear interpolation to ``size`` places along an axis; ``align_corners=False`` of torch.

    Place i of the new axis lies at ``(i + 1/2) old / size - 1/2`` of the old one, moved into its
    range. The same size gives x, exactly.

    Args:
        x: values.
        size: new number of places.
        dim: the axis, counted from the front.
    """
    old = x.shape[dim]
    steps = torch.arange(size, device=x.device)
    place = ((2 * steps + 1) * old - size).clamp(min=0)  # in units of half a new place: integers
    lower = place // (2 * size)
    upper = (lower + 1).clamp(max=old - 1)
    share = (place - 2 * size * lower).to(torch.promote_types(x.dtype, torch.float32)) / (2 * size)
    share = share.to(x.dtype).reshape(-1, *(1,) * (x.dim() - dim - 1))
    return torch.lerp(x.index_select(dim, lower), x.index_select(dim, upper), share)


def stretch_grid(x: Tensor, grid: tuple[int, int], dim: int) -> Tensor:
    """Bilinear interpolation of rows (axis ``dim``) and columns (the next axis)."""
    return stretch(stretch(x, grid[0], dim), grid[1], dim + 1)


def averages(old: int, new: int, like: Tensor) -> Tensor:
    """Matrix (new, old) of adaptive average pooling: row i is the mean over the places ``floor(i
    old / new)`` to ``ceil((i + 1) old / new) - 1``.

    Args:
        old: number of places.
        new: number of means.
        like: tensor whose device and dtype the matrix gets.
    """
    places = torch.arange(old, device=like.device)
    cells = torch.arange(new, device=like.device)[:, None]
    inside = (places >= cells * old // new) & (places < ((cells + 1) * old + new - 1) // new)
    weights = inside.to(torch.promote_types(like.dtype, torch.float32))
    return (weights / weights.sum(dim=1, keepdim=True)).to(like.dtype)


class GridTable(nn.Module):
    """A learned code for every cell of a grid, zero at first; other grids interpolate it.

    Args:
        grid: rows and columns that have a code of their own.
        dim: width of a code.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Codes (1, rows * columns, D)."""
        return stretch_grid(self.table.unflatten(1, self.grid), grid, 1).flatten(1, 2)
