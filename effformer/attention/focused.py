"""Focused linear attention: features that point more sharply, and keep their length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.config import Config as BaseConfig
from effformer.context import Context
from effformer.nn.lepe import LePE
from effformer.nn.precision import widened
from effformer.registry import Caps, attention
from effformer.site import Site
from effformer.values import Count, Odd, Positive

from .lin import CodedMixer, joined, lin, lin_macs

__all__ = ["Focused"]


@attention.register("focused", caps=Caps(axes="hw", cost="n"), paper="2308.00442")
class Focused(CodedMixer):
    """Focused linear attention: ``W(lin(f(q), f(k), v) + dwconv(v))`` with ``f(t) = |t| t^p /
    |t^p|``.

    ``t = (relu(.) + 1e-6) / softplus(s)`` with a learned s per channel. Norms are over the whole
    width, not per head, so f keeps the length of t and turns it towards its largest channels. Heads
    share the kernels of the convolution.

    Where the model fixes its grid, keys get a learned code per cell, and other grids interpolate
    it. With ``reduction`` r, keys and values come from `Reduction`, and the values are interpolated
    back to N tokens for the convolution, as published along the row of all tokens, not in 2-D.

    Differs from the paper: t is divided by its largest channel before the power, which changes
    nothing but the range, so that no power over- or underflows.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        CapabilityError: see `GridMixer`.

    Reference: FLatten Transformer: Vision Transformer using Focused Linear Attention, 2023, arXiv
    2308.00442.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `Focused`.

        Attributes:
            qkv_bias: the input projections have biases.
            proj_bias: the output projection has a bias.
            power: p; 1 leaves plain relu features.
            positions: keys get learned codes where the model fixes its grid.
            reduction: side r of the squares of cells that share a key.
            kernel: side of the convolution, odd.
            eps: added to the normaliser.
        """

        qkv_bias: bool = True
        proj_bias: bool = True
        power: Positive = 3.0
        positions: bool = True
        reduction: Count = 1
        kernel: Odd = 5
        eps: Positive = 1e-6

    NAME = "focused"

    def __init__(self, config: Focused.Config, site: Site) -> None:
        super().__init__(config, site)
        dim, bias = site.dim, config.qkv_bias
        self.q = nn.Linear(dim, dim, bias=bias)
        self.build_keys(dim, bias=bias, codes=config.positions)
        self.scale = nn.Parameter(torch.zeros(site.heads, 1, self.head_dim))
        self.lepe = LePE(self.head_dim, config.kernel)
        self.proj = nn.Linear(dim, site.out_dim or dim, bias=config.proj_bias)

    def mix(self, x: Tensor, grid: tuple[int, int], ctx: Context) -> Tensor:
        k, v = self.keys_values(x, grid)
        q, k, v = (self.split(t, name, ctx) for name, t in (("q", self.q(x)), ("k", k), ("v", v)))
        mixed = lin(self.focus(q), self.focus(k), widened(v), eps=self.config.eps)
        v = self.spread(v, x.shape[1])
        return self.proj(joined(mixed).to(x.dtype) + self.lepe(v, grid))

    def focus(self, x: Tensor) -> Tensor:
        """Focus heads (B, H, N, d) by f, in float32 at least."""
        t = (F.relu(widened(x)) + 1e-6) / F.softplus(widened(self.scale))
        sharp = (t / t.detach().amax(dim=(1, 3), keepdim=True)) ** self.config.power
        return sharp * (_length(t) / _length(sharp))

    def image_macs(self, grid: tuple[int, int], front: int) -> int:
        n, dim, d = grid[0] * grid[1], self.site.dim, self.head_dim
        keys, fewer = self.key_macs(n, grid)
        products = lin_macs(n, keys, heads=self.heads, features=d, values=d)
        projections = dim * ((n + 2 * keys) * dim + n * self.proj.out_features)
        return projections + fewer + products + self.lepe.macs(n, dim)


def _length(x: Tensor) -> Tensor:
    """Norm over the joint width of heads (B, H, N, d)."""
    return x.square().sum(dim=(1, 3), keepdim=True).sqrt()
