"""What the linear attentions of images share: place on a 2-D grid, normalisation, rotary tables.

Shape legend: B batch, H heads, N queries, n keys, K feature width, V value width, D token width, d
= D / H.
"""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.checks import CapabilityError
from effformer.context import EMPTY, Context, check_context
from effformer.nn.lepe import Reduction
from effformer.nn.precision import exactly
from effformer.nn.resample import GridTable, stretch
from effformer.site import Site

from .base import Mixer

__all__ = [
    "CodedMixer",
    "GridMixer",
    "axial_tables",
    "elu_features",
    "joined",
    "lin",
]


def lin(
    q: Tensor, k: Tensor, v: Tensor, *, eps: float, turned: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``Q (K^T V / n) / (Q mean_j K_j^T + eps)``: linear attention that averages over the keys.

    Averages keep features and ``eps`` of one size for any number of keys; they equal sums with an
    eps n times as large. Evaluated in the precision of the inputs, under autocast, too.

    Args:
        q: features of the queries (B, H, N, K).
        k: features of the keys (B, H, n, K).
        v: values (B, H, n, V).
        eps: added to the normaliser.
        turned: rotated features of queries and keys for the numerator; the normaliser takes the
            unrotated ones, which cannot cancel.
    """
    with exactly(q):
        top_q, top_k = (q, k) if turned is None else turned
        kv = top_k.mT @ (v / k.shape[2])
        return top_q @ kv / (q @ k.mean(dim=2, keepdim=True).mT + eps)


def lin_macs(n: int, keys: int, *, heads: int, features: int, values: int) -> int:
    """Multiply-adds of `lin`."""
    return heads * features * ((n + keys) * values + n)


def elu_features(x: Tensor) -> Tensor:
    """``elu(x) + 1``, positive, contiguous."""
    return F.elu(x.contiguous()) + 1


def joined(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


def axial_tables(
    grid: tuple[int, int], frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for interleaved pairs, (h * w, 4 F): F angles of the row, then F of the
    column.

    Args:
        grid: rows and columns.
        frequencies: (F,) float64 angles per step, on the device of the tables.
        dtype: of the tables.
    """
    rows, columns = (
        torch.arange(size, device=frequencies.device, dtype=torch.float64)[:, None] * frequencies
        for size in grid
    )
    angles = torch.cat(
        [rows[:, None].expand(-1, grid[1], -1), columns.expand(grid[0], -1, -1)], dim=-1
    )
    angles = angles.flatten(0, 1).repeat_interleave(2, dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class GridMixer(Mixer):
    """A token mixer over the rows and columns of a grid.

    Frames of a (T, H, W) grid are mixed one by one.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        CapabilityError: the width does not fit; at call, no grid with rows and columns, or a
            `Context` field that cannot be honoured.
    """

    NAME: ClassVar[str]
    UNIT: ClassVar[int] = 1
    """What the width of a head must be a multiple of."""

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__(config, site)
        self.where, self.heads = site.path or self.NAME, site.heads
        if site.dim % (site.heads * self.UNIT):
            unit = "" if self.UNIT == 1 else f" and {self.UNIT} channels of each"
            raise self.refusal(f"cannot cut {site.dim} channels into {site.heads} heads{unit}")
        self.head_dim = site.dim // site.heads
        self.reduction: int = getattr(config, "reduction", 1)
        self.cells: tuple[int, int] | None = None
        """Rows and columns where the model fixes them."""
        if site.cells is not None and len(site.cells) > 1:
            self.cells = (site.cells[-2], site.cells[-1])
            self.reduced(self.cells)
        self.drop = nn.Dropout(site.dropout)

    @abstractmethod
    def mix(self, x: Tensor, grid: tuple[int, int], ctx: Context) -> Tensor:
        """Mix the tokens of an image, (B, front + h * w, D) -> the same without dropout."""

    @abstractmethod
    def image_macs(self, grid: tuple[int, int], front: int) -> int:
        """Dense multiply-adds of one image."""

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        check_context(ctx, self.caps, "attention", self.where, x)
        if ctx.grid is None or len(ctx.grid) < 2:
            raise self.refusal(f"needs ctx.grid with rows and columns, got {ctx.grid}")
        *frames, height, width = ctx.grid
        front = x.shape[1] - prod(ctx.grid)
        if front < 0:
            raise ValueError(f"{self.where}: {x.shape[1]} tokens do not fill the grid {ctx.grid}")
        if front > 0 and (frames or not self.caps.front):
            behind = "a grid of several frames" if self.caps.front else "the grid"
            raise self.refusal(f"has no place for the {front} tokens in front of {behind}")
        images = x.reshape(-1, height * width, x.shape[2]) if frames else x
        y = self.mix(images, (height, width), ctx)
        return self.drop(y.reshape(x.shape[0], x.shape[1], -1) if frames else y)

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        if grid is None:
            grid = self.site.cells if self.site.cells and self.site.length == n else (1, n)
        *frames, height, width = grid
        return prod(frames) * self.image_macs((height, width), n - prod(grid))

    def reduced(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Layout of the keys.

        Raises:
            ValueError: none are left.
        """
        height, width = grid[0] // self.reduction, grid[1] // self.reduction
        if self.reduction > 1 and not height * width:
            raise ValueError(
                f"{self.where}: reduction={self.reduction} leaves no key of a grid "
                f"{tuple(grid)}; use a smaller one, or give the grid"
            )
        return height, width

    def split(self, x: Tensor, name: str, ctx: Context) -> Tensor:
        """Heads (B, H, N, d) of (B, N, D), as the tap ``<path>.<name>`` leaves them."""
        x = x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return x if ctx.tap is None else ctx.tap(f"{self.site.path}.{name}", x)

    def refusal(self, reason: str) -> CapabilityError:
        """The error for what the mixer cannot do."""
        return CapabilityError(
            f"{self.where}: {self.NAME!r} {reason}; choices: softmax, flow, linear"
        )


class CodedMixer(GridMixer):
    """What focused attention and PolaFormer share: keys and values of a coarser grid, learned codes
    of the keys, and the values again on the full grid for the convolution.
    """

    def build_keys(self, dim: int, *, bias: bool, codes: bool) -> None:
        """Make the projection ``kv``, the reduction, and the codes where the model fixes its grid."""
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.reduce = Reduction(dim, self.reduction) if self.reduction > 1 else None
        self.positions: GridTable | None = None
        if codes and self.cells is not None:
            self.positions = GridTable(self.reduced(self.cells), dim)

    def keys_values(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Keys and values (B, n, D) of tokens (B, N, D)."""
        k, v = self.kv(x if self.reduce is None else self.reduce(x, grid)).chunk(2, dim=-1)
        return (k if self.positions is None else k + self.positions(self.reduced(grid))), v

    def spread(self, v: Tensor, n: int) -> Tensor:
        """Values of heads (B, H, n, d) for every token, (B, N, D)."""
        v = joined(v)
        return v if self.reduce is None else stretch(v, n, dim=1)

    def key_macs(self, n: int, grid: tuple[int, int]) -> tuple[int, int]:
        """Number of keys, and multiply-adds of what reduces them."""
        if self.reduce is None:
            return n, 0
        keys = prod(self.reduced(grid))
        return keys, self.reduce.macs(keys)
