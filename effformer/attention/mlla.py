"""MLLA: linear attention with rotary features and a local encoding of the values."""

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

__all__ = ["MLLA"]


@attention.register("mlla", caps=Caps(axes="hw", cost="n"), paper="2405.16605")
class MLLA(GridMixer):
    """Mamba-like linear attention: ``o_i = (R_i q_i) mean_j((R_j k_j)^T x_j) / (q_i . mean_j k_j +
    eps) + dwconv(x)_i``, with ``q, k = elu(W x) + 1``.

    The values are the tokens themselves, and there is no output projection: in the published block
    a gate and projections stand around it. R rotates the whole width before the heads are cut, D/4
    pairs by ``row theta_p`` and D/4 by ``column theta_p`` with ``theta_p = base^(-p / (D/4))``; so
    the first half of the heads sees rows, the second columns. The normaliser is not rotated.

    Differs from the paper: rotary tables are made for the present grid, which need not be square.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        CapabilityError: the width is not divisible by 4 or by the heads; see `GridMixer`.

    Reference: Demystify Mamba in Vision: A Linear Attention Perspective, 2024, arXiv 2405.16605.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `MLLA`.

        Attributes:
            qk_bias: the projection has a bias.
            rope: features are rotated.
            base: of the frequencies.
            kernel: side of the convolution, odd.
            eps: added to the normaliser.
        """

        qk_bias: bool = True
        rope: bool = True
        base: Positive = 10_000.0
        kernel: Odd = 3
        eps: Positive = 1e-6

    NAME = "mlla"

    def __init__(self, config: MLLA.Config, site: Site) -> None:
        super().__init__(config, site)
        if config.rope and site.dim % 4:
            raise self.refusal(f"rotates quarters of the width, which {site.dim} has not")
        if site.out_dim not in (None, site.dim):
            raise self.refusal(f"keeps the width of tokens, {site.dim}")
        self.qk = nn.Linear(site.dim, 2 * site.dim, bias=config.qk_bias)
        self.lepe = LePE(site.dim, config.kernel)

    def mix(self, x: Tensor, grid: tuple[int, int], ctx: Context) -> Tensor:
        q, k = self.qk(x).chunk(2, dim=-1)
        q, k = (elu_features(widened(self.split(t, name, ctx))) for name, t in (("q", q), ("k", k)))
        v = self.split(x, "v", ctx)
        turned = None
        if self.config.rope:
            tables = self.tables(grid, q)
            turned = (self._turned(q, *tables), self._turned(k, *tables))
        mixed = lin(q, k, widened(v), eps=self.config.eps, turned=turned)
        return joined(mixed).to(x.dtype) + self.lepe(joined(v), grid)

    def tables(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the whole width, (h * w, D), device and dtype of ``like``."""
        quarter = self.site.dim // 4
        steps = torch.arange(quarter, dtype=torch.float64, device=like.device)
        return axial_tables(grid, self.config.base ** (-steps / quarter), like.dtype)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate heads over their joint width."""
        whole = rotate(joined(x), cos, sin, interleaved=True)
        return whole.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def image_macs(self, grid: tuple[int, int], front: int) -> int:
        n, dim, d = grid[0] * grid[1], self.site.dim, self.head_dim
        products = lin_macs(n, n, heads=self.heads, features=d, values=d)
        return 2 * n * dim * dim + products + self.lepe.macs(n, dim)
