"""Embeddings: time steps, labels, fixed sin-cos positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from effformer.checks import check_ids

from .gates import values_known
from .precision import exactly, widened

__all__ = [
    "FourierPositions",
    "LabelEmbedding",
    "TimeEmbedding",
    "is_formula",
    "resize_positions",
    "sincos_1d",
    "sincos_2d",
    "time_features",
]


def time_features(t: Tensor, dim: int = 256, *, freq_shift: int = 0, period: float = 1e4) -> Tensor:
    """Sinusoidal features ``[cos(t f) | sin(t f)]``, ``f_i = exp(-ln(period) i / (dim/2 -
    freq_shift))``.

    Args:
        t: (B,) times, any float or integer type; computed in float32 (float64 stays).
        dim: number of features, even.
        freq_shift: 0 as in DiT, 1 as in diffusers' default.
        period: longest period over 2 pi.

    Returns:
        (B, dim).

    Raises:
        TypeError: complex times.
    """
    if t.is_complex():
        raise TypeError(f"times t must be real numbers, got {t.dtype}")
    half = dim // 2
    t = t if t.dtype == torch.float64 else t.float()
    steps = torch.arange(half, dtype=t.dtype, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(period) * steps / (half - freq_shift))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """``W2 silu(W1 features(t) + b1) + b2``.

    Args:
        dim: output width.
        features: number of sinusoidal features.
        freq_shift: see `time_features`.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"": "t_mlp"}

    def __init__(self, dim: int, features: int = 256, freq_shift: int = 0) -> None:
        super().__init__()
        self.features = features
        self.freq_shift = freq_shift
        self.fc1 = nn.Linear(features, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map t (B,) to (B, D) of ``dtype`` (that of the weights); features are never half."""
        e = time_features(t, self.features, freq_shift=self.freq_shift).to(dtype)
        out: Tensor = self.fc2(nn.functional.silu(self.fc1(e)))
        return out


class LabelEmbedding(nn.Module):
    """Class table; with ``null=True`` one more row stands for "no label" (classifier-free
    guidance).

    Args:
        num_classes: number of classes; id ``num_classes`` is the null class.
        dim: width.
        null: the table has the null row.
    """

    def __init__(self, num_classes: int, dim: int, *, null: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.null = null
        self.table = nn.Embedding(num_classes + null, dim)

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """Map labels y (B,) to (B, D); where ``drop`` (B,) is True the null class is taken.

        Raises:
            ValueError: ``drop`` is given but there is no null class, or a label is no class.
        """
        check_ids(y, self.table.num_embeddings, where="labels y")
        if drop is not None:
            if not self.null:
                raise ValueError(
                    "drop: this model has no null class; build it with label_dropout > 0"
                )
            y = torch.where(drop, self.num_classes, y)
        return self.table(y)


def is_formula(table: Tensor, formula: Tensor) -> bool:
    """Whether a stored table of positions is what its formula gives, up to rounding in its own type.

    A graph that serves every size carries the formula; where the table is another one, it serves
    the sizes of the table only. Of tensors without values nothing else is known: True.

    Args:
        table: what a model stores.
        formula: what it gives at other sizes, of the same shape.
    """
    if not values_known(table):
        return True
    atol = max(1e-5, torch.finfo(table.dtype).eps)
    return torch.allclose(table.float(), formula.to(table).float(), rtol=0, atol=atol)


def sincos_1d(positions: Tensor, dim: int, *, period: float = 1e4) -> Tensor:
    """``[sin(s w) | cos(s w)]`` with ``w_i = period^(-i / (dim/2))``, computed in float64.

    Args:
        positions: (N,) coordinates.
        dim: width, even.
        period: base of the frequencies.

    Returns:
        (N, dim) float64.
    """
    steps = torch.arange(dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, None] * (1.0 / period ** (steps / (dim / 2)))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(height: int, width: int, dim: int, *, step: float = 1.0) -> Tensor:
    """Fixed 2-D positions at whole numbers of steps: ``[code(column) | code(row)]``, row-major.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        dim: width of a code, divisible by 4.
        step: distance of two cells.

    Returns:
        (1, height * width, dim) float32.

    Reference: Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748 (official layout:
    the first half of a code stands for the column).
    """
    rows = sincos_1d(torch.arange(height) * step, dim // 2)[:, None].expand(-1, width, -1)
    columns = sincos_1d(torch.arange(width) * step, dim // 2)[None].expand(height, -1, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None].float()


def resize_positions(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], *, front: int = 0
) -> Tensor:
    """Interpolate a learned position table to another grid (bicubic, antialiased).

    Args:
        table: (1, front + rows * columns, D).
        old: rows and columns of the present grid.
        new: rows and columns wanted.
        front: number of codes before the grid, which stay as they are.

    Returns:
        (1, front + new rows * new columns, D), of the table's dtype.

    Raises:
        ValueError: the table does not have the size of the old grid.
    """
    if table.dim() != 3 or table.shape[1] != front + old[0] * old[1]:
        raise ValueError(
            f"resize_positions: expected (1, {front} + {old[0]} * {old[1]}, D), "
            f"got {tuple(table.shape)}"
        )
    if old == new:
        return table
    cells = table[:, front:].float().transpose(1, 2).unflatten(2, old)
    cells = nn.functional.interpolate(cells, size=new, mode="bicubic", antialias=True)
    return torch.cat([table[:, :front], cells.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class FourierPositions(nn.Module):
    """``W [sin(2 pi x B), cos(2 pi x B)] + b`` of cells at x, with B drawn once and kept.

    Args:
        axes: number of coordinates.
        dim: width, even.
        scale: standard deviation of B.

    Reference: Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional
    Domains, 2020, arXiv 2006.10739.
    """

    def __init__(self, axes: int, dim: int, scale: float = 8.0) -> None:
        super().__init__()
        self.scale = scale
        self.frequencies = nn.Parameter(torch.empty(axes, dim // 2), requires_grad=False)
        self.proj = nn.Linear(dim, dim)
        nn.init.normal_(self.frequencies, std=scale)

    def forward(self, cells: Tensor) -> Tensor:
        """(N, axes) -> (N, D)."""
        with exactly(cells):
            angles = 2 * math.pi * widened(cells) @ widened(self.frequencies)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.proj(waves.to(self.proj.weight.dtype))
