"""Biases between the cells of a grid and agents."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.nn.resample import stretch, stretch_grid

__all__ = ["AgentBias"]

_TABLE = 7


class AgentBias(nn.Module):
    """Biases of cells towards agents, for grids of any size.

    Two learned 7 x 7 maps for every head and agent, interpolated to the grid. Where the model fixes
    its grid there is also a number for every row and every column (interpolated, too), and one for
    every token in front of the grid; without, tokens in front have a bias of 0.

    Args:
        heads: number of heads H.
        agents: number of agents a.
        sizes: rows and columns of the queries, and of the keys; None: the maps alone.
        front: number of tokens in front of the grid.
    """

    def __init__(
        self,
        heads: int,
        agents: int,
        sizes: tuple[tuple[int, int], tuple[int, int]] | None,
        front: int = 0,
    ) -> None:
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = {"keys": (_TABLE, _TABLE), "queries": (_TABLE, _TABLE)}
        if sizes is not None:
            (height, width), (key_height, key_width) = sizes
            shapes |= {"key_rows": (key_height,), "key_columns": (key_width,)}
            shapes |= {"query_rows": (height,), "query_columns": (width,)}
            shapes |= {"key_front": (front,), "query_front": (front,)} if front else {}
        self.lines, self.front = sizes is not None, front
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(heads, agents, *shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random values, cut at two standard deviations of 0.02."""
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def forward(self, side: Literal["key", "query"], grid: tuple[int, int], front: int) -> Tensor:
        """Biases of one side, (H, a, front + h * w).

        Raises:
            ValueError: another number of tokens in front than the biases are for.
        """
        if self.front and front != self.front:
            raise ValueError(
                f"agent: biases for {self.front} tokens in front of the grid, got {front}"
            )
        bias = stretch_grid(getattr(self, "keys" if side == "key" else "queries"), grid, 2)
        if self.lines:
            rows, columns = getattr(self, f"{side}_rows"), getattr(self, f"{side}_columns")
            bias = bias + stretch(rows, grid[0], 2)[..., None]
            bias = bias + stretch(columns, grid[1], 2)[..., None, :]
        cells = bias.flatten(2)
        if self.front:
            return torch.cat([getattr(self, f"{side}_front"), cells], dim=2)
        return F.pad(cells, (front, 0))
