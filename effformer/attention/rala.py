"""RALA: linear attention whose keys are weighted, and whose output is gated, to raise its rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effformer.config import Config as BaseConfig
from effformer.context import Context
from effformer.nn.lepe import LePE
from effformer.nn.precision import widened
from effformer.places import rotate
from effformer.registry import Caps, attention
from effformer.site import Site
from effformer.values import Odd, Positive

from .lin import GridMixer, axial_tables, elu_features, joined, lin, lin_macs

__all__ = ["RALA"]


@attention.register("rala", caps=Caps(axes="hw", cost="n"), paper="2411.07635")
class RALA(GridMixer):
    """Rank-augmented linear attention: ``W((LIN(q, n a_j k_j, v) + dwconv(v)) * g)``.

    ``q, k, v, g`` are projections of the tokens, ``q, k`` pass elu + 1, and every key counts as
    often as ``a = softmax_j(d^-1/2 mean_i(q_i) . k_j)`` says: the mean weight is 1. `lin` is the
    normalised product; its numerator takes rotated queries and keys, d/4 pairs of every head by the
    row and d/4 by the column with angles ``base^(-linspace(0, 1, d/4))`` a step, both ends
    included. The gate g has no activation.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        CapabilityError: the width of a head is not divisible by 4; see `GridMixer`.

    Reference: Breaking the Low-Rank Dilemma of Linear Attention, 2024, arXiv 2411.07635.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `RALA`.

        Attributes:
            qkv_bias: the input projection has a bias.
            proj_bias: the output projection has a bias.
            weighted: keys are weighted; without, every a_j is 1 / n.
            rope: features are rotated.
            base: of the frequencies.
            kernel: side of the convolution, odd.
            eps: added to the normaliser.
        """

        qkv_bias: bool = True
        proj_bias: bool = True
        weighted: bool = True
        rope: bool = True
        base: Positive = 10_000.0
        kernel: Odd = 5
        eps: Positive = 1e-6

    NAME = "rala"

    def __init__(self, config: RALA.Config, site: Site) -> None:
        super().__init__(config, site)
        if config.rope and self.head_dim % 4:
            raise self.refusal(
                f"rotates quarters of a head, which the width {self.head_dim} has not"
            )
        self.qkvg = nn.Linear(site.dim, 4 * site.dim, bias=config.qkv_bias)
        self.lepe = LePE(site.dim, config.kernel)
        self.proj = nn.Linear(site.dim, site.out_dim or site.dim, bias=config.proj_bias)

    def mix(self, x: Tensor, grid: tuple[int, int], ctx: Context) -> Tensor:
        q, k, v, gate = self.qkvg(x).chunk(4, dim=-1)
        q, k = (elu_features(widened(self.split(t, name, ctx))) for name, t in (("q", q), ("k", k)))
        v = self.split(v, "v", ctx)
        if self.config.weighted:
            scores = (q.mean(dim=2, keepdim=True) * self.head_dim**-0.5) @ k.mT
            k = k * (scores.softmax(dim=-1).mT * k.shape[2])
        turned = None
        if self.config.rope:
            cos, sin = self.tables(grid, q)
            turned = (rotate(q, cos, sin, interleaved=True), rotate(k, cos, sin, interleaved=True))
        mixed = joined(lin(q, k, widened(v), eps=self.config.eps, turned=turned)).to(x.dtype)
        return self.proj((mixed + self.lepe(joined(v), grid)) * gate)

    def tables(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for one head, (h * w, d), device and dtype of ``like``."""
        quarter = self.head_dim // 4
        steps = torch.linspace(0, 1, quarter, dtype=torch.float64, device=like.device)
        return axial_tables(grid, self.config.base ** (-steps), like.dtype)

    def image_macs(self, grid: tuple[int, int], front: int) -> int:
        n, dim, d = grid[0] * grid[1], self.site.dim, self.head_dim
        products = lin_macs(n, n, heads=self.heads, features=d, values=d)
        weights = n * dim if self.config.weighted else 0
        projections = n * dim * (4 * dim + self.proj.out_features)
        return projections + products + weights + self.lepe.macs(n, dim)
