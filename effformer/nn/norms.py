"""Norms chosen by a `Site`, and the adaLN modulation around them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.checks import unknown
from effformer.site import Site

__all__ = ["Modulation", "TokenBatchNorm", "branch_norm", "make_norm", "modulate"]


def make_norm(site: Site, dim: int | None = None, *, affine: bool | None = None) -> nn.Module:
    """The norm of a site over the last dimension.

    Args:
        site: gives kind, epsilon and whether there are learned factors.
        dim: width if it is not ``site.dim`` (heads).
        affine: overrides ``site.norm.affine``.

    Raises:
        ValueError: ``site.norm.kind`` is neither "layer" nor "rms".
    """
    width, rule = site.dim if dim is None else dim, site.norm
    learned = rule.affine if affine is None else affine
    if rule.kind == "layer":
        return nn.LayerNorm(width, eps=rule.eps, elementwise_affine=learned)
    if rule.kind == "rms":
        return nn.RMSNorm(width, eps=rule.eps, elementwise_affine=learned)
    raise unknown("norm", rule.kind, ["layer", "rms"], where=site.path)


def branch_norm(site: Site, *, ffn: bool = False) -> nn.Module:
    """The norm before a part; where the model is conditioned, the modulation follows it.

    Args:
        site: the place.
        ffn: the part is a position-wise network, whose norm may have an epsilon of its own.
    """
    if ffn and site.norm.ffn_eps is not None:
        site = replace(site, norm=replace(site.norm, eps=site.norm.ffn_eps))
    return make_norm(site, affine=None if site.cond_dim is None else site.norm.modulated_affine)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``; x (B, N, D), shift and scale (B, 1, D), one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of every channel over all tokens (B, N, D).

    In training a sample sees the others, and padded tokens enter the statistics; in evaluation the
    running statistics make it an affine map.

    Reference: Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift, 2015, arXiv 1502.03167.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return super().forward(x.flatten(0, 1)).view_as(x)


class Modulation(nn.Module):
    """Vectors from the conditioning: ``Linear(silu(c))`` cut into ``parts`` chunks of (B, 1, D).

    Weights and bias start at zero, so that every gated branch starts as the identity (adaLN-Zero).

    Args:
        cond_dim: width of the conditioning vector.
        dim: width of the tokens.
        parts: number of vectors.

    Reference: Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748.
    """

    def __init__(self, cond_dim: int, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(cond_dim, parts * dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero weight and bias."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cond: Tensor) -> tuple[Tensor, ...]:
        """Map cond (B, Dc) to ``parts`` tensors (B, 1, D)."""
        return self.linear(F.silu(cond)).unsqueeze(1).chunk(self.parts, dim=-1)
