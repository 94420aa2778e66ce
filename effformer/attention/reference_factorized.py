"""The slow obvious form of factorized attention: loops over the cells of a grid, one head of one
sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["axis_kernel_reference", "chained_reference", "parallel_reference"]


def axis_kernel_reference(
    q: Tensor, k: Tensor, coords: Tensor, *, scale: float = 1.0, rope_scale: float = 64.0
) -> Tensor:
    """``scale * (R(t_i) q_i) . (R(t_j) k_j)`` for q and k (n, K), pair by pair of channels."""
    n, width = q.shape
    half = width // 2
    rows = []
    for i, j in itertools.product(range(n), range(n)):
        # turning both is turning one by the difference
        turn = float(coords[i] - coords[j]) * rope_scale
        total = q.new_zeros(())
        for m in range(half):
            angle = turn * 10_000 ** (-2 * m / width)
            same = q[i, m] * k[j, m] + q[i, m + half] * k[j, m + half]
            cross = q[i, m] * k[j, m + half] - q[i, m + half] * k[j, m]
            total = total + math.cos(angle) * same + math.sin(angle) * cross
        rows.append(scale * total)
    return torch.stack(rows).view(n, n)


def chained_reference(kernels: Sequence[Tensor], v: Tensor) -> Tensor:
    """``sum_j K_x[i_x, j_x] K_y[i_y, j_y] ... v[j]`` for v (n_x, n_y, ..., C): all axes at once."""
    grid = v.shape[:-1]
    out = torch.zeros_like(v)
    for i in itertools.product(*map(range, grid)):
        for j in itertools.product(*map(range, grid)):
            weight = math.prod(
                (k[a, b] for k, a, b in zip(kernels, i, j, strict=True)), start=v.new_ones(())
            )
            out[i] = out[i] + weight * v[j]
    return out


def parallel_reference(kernels: Sequence[Tensor], v: Tensor) -> Tensor:
    """``[sum_j K_a[i_a, j] v[.. j ..]]`` over the axes a, side by side: (n_x, n_y, ..., axes C)."""
    grid = v.shape[:-1]
    slots = []
    for a, kernel in enumerate(kernels):
        out = torch.zeros_like(v)
        for i in itertools.product(*map(range, grid)):
            for j in range(grid[a]):
                out[i] = out[i] + kernel[i[a], j] * v[(*i[:a], j, *i[a + 1 :])]
        slots.append(out)
    return torch.cat(slots, dim=-1)
