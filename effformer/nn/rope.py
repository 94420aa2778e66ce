"""Rotary position embedding (RoPE): application, and tables for image grids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.config import Config as BaseConfig
from effformer.context import Rope

__all__ = ["GridRope", "apply_rope", "rotate"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the pairs of the last dimension; x (B, H, N, K), tables (N, K)."""
    if interleaved:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return x * cos + turned * sin


def apply_rope(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys (B, H, N, K).

    Reference: RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv
    2104.09864.
    """
    key_cos = rope.cos if rope.key_cos is None else rope.key_cos
    key_sin = rope.sin if rope.key_sin is None else rope.key_sin
    q = rotate(q, rope.cos, rope.sin, interleaved=rope.interleaved)
    return q, rotate(k, key_cos, key_sin, interleaved=rope.interleaved)


class GridRope(nn.Module):
    """Rotary tables for the cells of a 2-D grid, for any grid size.

    A head of width K has K / 2 angles per cell at coordinates (a, b)::

        axial, centered    [a w_0 ... a w_(K/4-1) | b w_0 ... b w_(K/4-1)],  w_i = T^(-4 i / K)
        mixed              a u_i + b v_i,  u and v learned for every layer and head

    "axial" counts cells, "centered" maps the grid to [-1, 1] and multiplies the w_i by 2 pi
    (DINOv3), "mixed" counts cells.

    Args:
        config: the knobs.
        head_dim: width K of a head, divisible by 4.
        heads: number of heads.
        depth: number of layers.

    Raises:
        ValueError: the head width is not divisible by 4.

    Reference: Rotary Position Embedding for Vision Transformer, 2024, arXiv 2403.13298 (axial and
    mixed); DINOv3, 2025, arXiv 2508.10104 (centered).
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
        """

        kind: Literal["axial", "centered", "mixed"] = "axial"
        temperature: float = 100.0
        first: Literal["row", "column"] = "row"
        offset: float = 0.0
        reference: tuple[int, int] | None = None
        interleaved: bool = True

        def __post_init__(self) -> None:
            if self.kind == "mixed" and not self.interleaved:
                raise ValueError("rope: kind 'mixed' has interleaved pairs; use interleaved=True")
            if self.kind != "axial" and self.reference is not None:
                raise ValueError(f"rope: kind {self.kind!r} has no reference grid")

    def __init__(self, config: GridRope.Config, head_dim: int, *, heads: int, depth: int) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"rope: heads of width {head_dim}; the width must be divisible by 4")
        self.config = config
        self.head_dim = head_dim
        if config.kind == "mixed":
            self.freqs = nn.Parameter(torch.empty(2, depth, heads, head_dim // 2))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Frequencies T^(-4 i / K) along two orthogonal directions, turned at random per head."""
        _, depth, heads, _ = self.freqs.shape
        turn = 2 * math.pi * torch.rand(depth, heads, 1, device=self.freqs.device)
        turns = torch.cat([turn, turn + math.pi / 2], dim=-1)[..., None]
        size = self._frequencies(self.freqs.device)
        with torch.no_grad():
            self.freqs[0] = (turns.cos() * size).flatten(-2)
            self.freqs[1] = (turns.sin() * size).flatten(-2)

    def forward(self, height: int, width: int, *, front: int = 0, like: Tensor) -> tuple[Rope, ...]:
        """Tables for ``front`` tokens that do not turn, then the cells of a grid, row-major.

        Args:
            height: rows of the grid.
            width: columns of the grid.
            front: number of tokens before the grid.
            like: tensor whose device and dtype the tables get.

        Returns:
            One `Rope` for all layers, or one per layer ("mixed"); tables (front + height * width,
            K), or (H, front + height * width, K).
        """
        a, b = self._coordinates(height, width, like.device)
        if self.config.kind == "mixed":
            u, v = self.freqs.float().unsqueeze(-2)
            angles = a[:, None] * u + b[:, None] * v
        else:
            w = self._frequencies(like.device)
            angles = torch.cat([a[:, None] * w, b[:, None] * w], dim=-1)
        cos, sin = self._spread(angles.cos()), self._spread(angles.sin())
        cos = F.pad(cos, (0, 0, front, 0), value=1.0).to(like.dtype)
        sin = F.pad(sin, (0, 0, front, 0)).to(like.dtype)
        if self.config.kind != "mixed":
            return (Rope(cos, sin, interleaved=self.config.interleaved),)
        return tuple(Rope(c, s, interleaved=True) for c, s in zip(cos, sin, strict=True))

    def _coordinates(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        config = self.config
        axes = []
        for i, size in enumerate((height, width)):
            x = torch.arange(size, device=device, dtype=torch.float32) + config.offset
            if config.kind == "centered":
                x = 2 * ((x + 0.5) / size) - 1
            elif config.reference is not None:
                x = x / size * config.reference[i]
            axes.append(x)
        rows = axes[0][:, None].expand(-1, width).flatten()
        columns = axes[1].expand(height, -1).flatten()
        return (rows, columns) if config.first == "row" else (columns, rows)

    def _frequencies(self, device: torch.device) -> Tensor:
        quarter = self.head_dim // 4
        steps = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
        turn = 2 * math.pi if self.config.kind == "centered" else 1.0
        return turn / self.config.temperature**steps

    def _spread(self, values: Tensor) -> Tensor:
        """One value per pair to one per channel."""
        if self.config.interleaved:
            return values.repeat_interleave(2, dim=-1)
        return torch.cat([values, values], dim=-1)
