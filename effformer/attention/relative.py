"""Softmax attention with a learned function of relative positions on a grid."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.context import EMPTY, Context
from effformer.nn.cut import cut_linear, twin
from effformer.nn.precision import exactly, widened
from effformer.registry import Caps, core
from effformer.site import Site
from effformer.values import Count

from .backends import fused
from .base import Core, CoreConfig

__all__ = ["Relative"]


@core.register(
    "relative", caps=Caps(axes="hw", front=True, width=True, cost="n^2"), paper="2111.09883"
)
class Relative(Core):
    """Softmax attention with a relative position bias: ``softmax(K^-0.5 q k^T + b(p_i - p_j)) v``.

    ``b(d) = W2 relu(W1 g(d) + b1) + b2`` gives one number per head, ``g(d) = sign(d) log(1 + |d|)``
    of the row and column distances on the grid; the distance of two frames in time has no part in
    it. Because it is a function of distances, it serves grids of any size. Tokens in front of the
    grid (class token, registers) have no bias. It is evaluated once per forward, whatever the
    batch, and ``macs`` leaves it out.

    Differs from the paper: distances are not divided by the window size, and the bias is not
    squashed (timm's "cr" form).

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        ValueError: at call, no grid with rows and columns, or more grid cells than tokens.

    Reference: Swin Transformer V2: Scaling Up Capacity and Resolution, 2021, arXiv 2111.09883.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        """Knobs of `Relative`.

        Attributes:
            hidden: inner width of the bias function.
        """

        hidden: Count = 128

        def check(self) -> None:
            if self.causal:
                raise ValueError("relative: has no causal form; use softmax, flow or linear")

    def __init__(self, config: Relative.Config, site: Site) -> None:
        super().__init__(config, site)
        self.fc1 = nn.Linear(2, config.hidden)
        self.fc2 = nn.Linear(config.hidden, site.heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        where = self.site.path or "relative"
        if ctx.grid is None or len(ctx.grid) < 2:
            raise ValueError(f"{where}: needs a grid with rows and columns, got {ctx.grid}")
        *frames, height, width = ctx.grid
        front = q.shape[2] - prod(ctx.grid)
        if front < 0:
            raise ValueError(f"{where}: {q.shape[2]} tokens do not fill the grid {ctx.grid}")
        with exactly(q):  # every pair of tokens has a part in its gradient
            bias = self.bias(height, width)
        if frames:
            bias = bias.repeat(1, prod(frames), prod(frames))
        bias = F.pad(bias, (front, 0, front, 0))
        return fused(q, k, v, attn_mask=bias[None].to(q.dtype))

    def bias(self, height: int, width: int) -> Tensor:
        """The bias between the cells of a grid, (H, height * width, height * width), in float32 at
        least.
        """
        weight = widened(self.fc1.weight)
        rows, columns = (
            torch.arange(size, device=weight.device, dtype=torch.int64) for size in (height, width)
        )
        distances = torch.cartesian_prod(
            torch.arange(1 - height, height, device=weight.device),
            torch.arange(1 - width, width, device=weight.device),
        ).to(weight.dtype)
        inner = F.linear(distances.sign() * distances.abs().log1p(), weight, widened(self.fc1.bias))
        values = F.linear(F.relu(inner), widened(self.fc2.weight), widened(self.fc2.bias))
        table = values.T.unflatten(1, (2 * height - 1, 2 * width - 1))
        down = rows[:, None] - rows + height - 1
        right = columns[:, None] - columns + width - 1
        return table[:, down[:, None, :, None], right[None, :, None, :]].flatten(3).flatten(1, 2)

    def select(self, heads: Tensor) -> Relative:
        small = twin(self)
        small.fc2 = cut_linear(self.fc2, rows=heads)
        return small

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        return 2 * heads * head_dim * n * n
