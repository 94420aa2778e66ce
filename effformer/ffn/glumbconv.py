"""A gated unit with a depthwise convolution over the grid of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from effformer.checks import CapabilityError
from effformer.context import EMPTY, Context
from effformer.nn.activations import ACTIVATIONS, Activation
from effformer.nn.cut import cut_linear, put, twin
from effformer.registry import Caps, ffn
from effformer.site import Site
from effformer.values import Odd, Positive

from .base import FFN, FFNConfig, refuse_fields

__all__ = ["GLUMBConv"]


@ffn.register("glumbconv", caps=Caps(axes="hw", front=True), paper="2410.10629")
class GLUMBConv(FFN):
    """Mix-FFN: ``(a, g) = dwconv3x3(silu(W1 x))``, ``W2 (a * silu(g))`` with a grid of tokens.

    Each token sees its neighbours within one step, which is how SANA knows positions. Frames of a
    (T, H, W) grid are convolved one by one. Tokens that stand in front of the grid (class token)
    meet their own weights only, like a grid of one token.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        CapabilityError: at call, no grid, or a context in which neighbours are not the grid's: a
            mask, packed rows, a stream.

    Reference: SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers,
    2024, arXiv 2410.10629.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FFNConfig):
        """Knobs of `GLUMBConv`.

        Attributes:
            bias: the first projection and the convolution have biases; the last never has one.
            kernel: side of the convolution, odd.
        """

        ratio: Positive = 2.5
        act: Activation = "silu"
        kernel: Odd = 3

    def __init__(self, config: GLUMBConv.Config, site: Site) -> None:
        super().__init__(config, site)
        self.kernel = config.kernel
        inner = 2 * self.hidden
        self.act = ACTIVATIONS[config.act]
        self.fc1 = nn.Linear(site.dim, inner, bias=config.bias)
        self.conv = nn.Conv2d(
            inner, inner, config.kernel, padding=config.kernel // 2, groups=inner, bias=config.bias
        )
        self.fc2 = nn.Linear(self.hidden, site.dim, bias=False)
        self.drop = nn.Dropout(site.dropout)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        self.check_width(ctx)
        grid = self._grid(x, ctx)
        h = self._mix(self.act(self.fc1(x)), grid)
        value, gate = h.chunk(2, dim=-1)
        return self.drop(self.fc2(value * self.act(gate)))

    def _mix(self, h: Tensor, grid: tuple[int, ...]) -> Tensor:
        rows, columns = grid[-2:]
        front = h.shape[1] - prod(grid)
        image = h[:, front:].reshape(-1, rows, columns, h.shape[-1]).permute(0, 3, 1, 2)
        mixed = self.conv(image).permute(0, 2, 3, 1).reshape(h.shape[0], -1, h.shape[-1])
        if not front:
            return mixed
        middle = self.kernel // 2
        alone = h[:, :front] * self.conv.weight[:, 0, middle, middle]
        if self.conv.bias is not None:
            alone = alone + self.conv.bias
        return torch.cat([alone, mixed], dim=1)

    def _grid(self, x: Tensor, ctx: Context) -> tuple[int, ...]:
        where = self.site.path or "glumbconv"
        refuse_fields(ctx, ("mask", "packing", "stream"), "'glumbconv' mixes neighbours", where)
        if ctx.grid is None or len(ctx.grid) < 2:
            raise CapabilityError(
                f"{where}: 'glumbconv' needs ctx.grid with rows and columns, got {ctx.grid}"
            )
        if prod(ctx.grid) > x.shape[1]:
            raise ValueError(f"{where}: grid {ctx.grid} does not fit {x.shape[1]} tokens")
        return ctx.grid

    def select(self, units: Tensor) -> GLUMBConv:
        """The network with some of its hidden channels, each with its gate."""
        small = twin(self)
        small.hidden = len(units)
        both = torch.cat([units, units + self.hidden])
        small.fc1 = cut_linear(self.fc1, rows=both)
        small.fc2 = cut_linear(self.fc2, columns=units)
        small.conv = twin(self.conv)
        put(small.conv, "weight", self.conv.weight.index_select(0, both))
        if self.conv.bias is not None:
            put(small.conv, "bias", self.conv.bias.index_select(0, both))
        small.conv.groups = small.conv.in_channels = small.conv.out_channels = len(both)
        return small

    def macs(self, n: int) -> int:
        return n * self.hidden * (3 * self.site.dim + 2 * self.kernel**2)
