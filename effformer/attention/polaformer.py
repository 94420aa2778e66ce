"""PolaFormer: linear attention that keeps the signs of queries and keys apart."""

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

__all__ = ["PolaFormer"]


@attention.register("polaformer", caps=Caps(axes="hw", cost="n"), paper="2501.15061")
class PolaFormer(CodedMixer):
    """Polarity-aware linear attention: ``W(([o_same, o_opposite] + dwconv(v)) * g)``.

    With ``t+ = relu(t)^p``, ``t- = relu(-t)^p`` and features ``K = [k+, k-]``, half of the channels
    of every head mixes values by ``lin([q+, q-], K, v_1)`` (equal signs attract), the other half by
    ``lin([q-, q+], K, v_2)`` (opposite signs do). ``p = 1 + alpha sigmoid(w)`` is learned for every
    channel, 1 + alpha/2 at first; queries and keys are divided by ``softplus(s)``, learned, too.
    The gate g has no activation. Heads share the kernels of the convolution.

    Where the model fixes its grid, keys get a learned code per cell, and other grids interpolate
    it. With ``reduction`` r, keys and values come from `Reduction`, and the values are interpolated
    back to N tokens for the convolution, as published along the row of all tokens, not in 2-D.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        CapabilityError: heads of odd width; see `GridMixer`.

    Reference: PolaFormer: Polarity-aware Linear Attention for Vision Transformers, 2025, arXiv
    2501.15061.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `PolaFormer`.

        Attributes:
            qkv_bias: the input projections have biases.
            proj_bias: the output projection has a bias.
            alpha: the powers lie between 1 and 1 + alpha.
            positions: keys get learned codes where the model fixes its grid.
            reduction: side r of the squares of cells that share a key.
            kernel: side of the convolution, odd.
            eps: added to the normaliser.
        """

        qkv_bias: bool = True
        proj_bias: bool = True
        alpha: Positive = 4.0
        positions: bool = True
        reduction: Count = 1
        kernel: Odd = 5
        eps: Positive = 1e-6

    NAME, UNIT = "polaformer", 2

    def __init__(self, config: PolaFormer.Config, site: Site) -> None:
        super().__init__(config, site)
        dim, bias = site.dim, config.qkv_bias
        self.qg = nn.Linear(dim, 2 * dim, bias=bias)
        self.build_keys(dim, bias=bias, codes=config.positions)
        self.scale = nn.Parameter(torch.zeros(site.heads, 1, self.head_dim))
        self.power = nn.Parameter(torch.zeros(site.heads, 1, self.head_dim))
        self.lepe = LePE(self.head_dim, config.kernel)
        self.proj = nn.Linear(dim, site.out_dim or dim, bias=config.proj_bias)

    def mix(self, x: Tensor, grid: tuple[int, int], ctx: Context) -> Tensor:
        q, gate = self.qg(x).chunk(2, dim=-1)
        k, v = self.keys_values(x, grid)
        q, k, v = (self.split(t, name, ctx) for name, t in (("q", q), ("k", k), ("v", v)))
        mixed = joined(self.polar(widened(q), widened(k), widened(v))).to(x.dtype)
        v = self.spread(v, x.shape[1])
        return self.proj((mixed + self.lepe(v, grid)) * gate)

    def polar(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Both halves of every head, (B, H, N, d), of heads in float32 at least."""
        scale = F.softplus(widened(self.scale))
        power = 1 + self.config.alpha * widened(self.power).sigmoid()
        # a power with a tensor as exponent has a gradient of 0, not NaN, at 0
        q_plus, q_minus, k_plus, k_minus = (
            F.relu(t) ** power for t in (q / scale, -q / scale, k / scale, -k / scale)
        )
        features, (same, opposite) = torch.cat([k_plus, k_minus], dim=-1), v.chunk(2, dim=-1)
        return torch.cat(
            [
                lin(torch.cat([q_plus, q_minus], dim=-1), features, same, eps=self.config.eps),
                lin(torch.cat([q_minus, q_plus], dim=-1), features, opposite, eps=self.config.eps),
            ],
            dim=-1,
        )

    def image_macs(self, grid: tuple[int, int], front: int) -> int:
        n, dim, d = grid[0] * grid[1], self.site.dim, self.head_dim
        keys, fewer = self.key_macs(n, grid)
        products = 2 * lin_macs(n, keys, heads=self.heads, features=2 * d, values=d // 2)
        projections = dim * (2 * (n + keys) * dim + n * self.proj.out_features)
        return projections + fewer + products + self.lepe.macs(n, dim)
