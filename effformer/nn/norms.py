"""Norms chosen by a `Site`, and the adaLN modulation around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.checks import unknown
from effformer.site import Site

from .precision import widened

__all__ = [
    "LayerNorm", "Modulation", "SharedModulation", "TokenBatchNorm", "branch_norm", "make_norm", "modulate",
]  # fmt: skip


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
        return LayerNorm(width, eps=rule.eps, elementwise_affine=learned)
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


class LayerNorm(nn.LayerNorm):
    """torch's layer norm, with gradients of weight and bias that are summed in float32 at least.

    torch's CPU kernel sums them over all rows in the dtype of x, under autocast, too: in bfloat16
    they are 6 % off after 2,048 rows and 11 % after 16,384.
    """

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and self.weight is not None and self.weight.requires_grad
        if not learns or x.device.type != "cpu":
            return super().forward(x)
        bias = None if self.bias is None else widened(self.bias)
        weight = widened(self.weight)
        return F.layer_norm(widened(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of every channel over all tokens (B, N, D).

    In training a sample sees the others, and padded tokens enter the statistics; in evaluation the
    running statistics make it an affine map. They are running sums, and kept in float32 at least.

    Reference: Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift, 2015, arXiv 1502.03167.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        weight, bias = widened(self.weight), widened(self.bias)
        if self.training:
            self.num_batches_tracked.add_(1)
        elif torch.compiler.is_exporting():  # the operator asks whether there are tokens at all
            scale = weight * (widened(self.running_var) + self.eps).rsqrt()
            moved = (widened(x) - widened(self.running_mean)) * scale + bias
            return moved.to(x.dtype)
        out = F.batch_norm(
            widened(x.flatten(0, 1)), self.running_mean, self.running_var, weight, bias,
            self.training, self.momentum, self.eps,
        )  # fmt: skip
        return out.view_as(x).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {"running_mean": self.running_mean, "running_var": self.running_var}
        super()._apply(fn, recurse)
        for name, exact in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != widened(moved).dtype:  # a cast to half precision
                setattr(self, name, exact.to(moved.device))
        return self


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
        """Map cond (B, Dc) to ``parts`` tensors (B, 1, D), or (B, N, Dc) to as many (B, N, D)."""
        made: Tensor = self.linear(F.silu(cond))
        return (made.unsqueeze(1) if cond.dim() == 2 else made).chunk(self.parts, dim=-1)

    def macs(self) -> int:
        """Multiply-adds of one sample."""
        return self.linear.in_features * self.linear.out_features


class SharedModulation(nn.Module):
    """Vectors that a model makes once for all blocks, and a learned table of this block's own
    (adaLN-single): ``E + c``, cut into ``parts`` chunks of (B, 1, D).

    Args:
        cond_dim: ``parts * dim``, the vectors of the model; of another width, they are made here by a
            `Modulation`.
        dim: width of the tokens.
        parts: number of vectors.

    Reference: PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image
    Synthesis, 2023, arXiv 2310.00426.
    """

    def __init__(self, cond_dim: int, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.table = nn.Parameter(torch.empty(parts, dim))
        self.own = None if cond_dim == parts * dim else Modulation(cond_dim, dim, parts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A random table, whose rows have length one on average."""
        nn.init.normal_(self.table, std=self.table.shape[1] ** -0.5)

    def forward(self, cond: Tensor) -> tuple[Tensor, ...]:
        """Map cond (B, Dc) to ``parts`` tensors (B, 1, D), or (B, N, Dc) to as many (B, N, D)."""
        if self.own is not None:
            given = torch.stack(self.own(cond), dim=-2)
        else:
            given = (cond.unsqueeze(1) if cond.dim() == 2 else cond).unflatten(-1, (self.parts, -1))
        return (self.table + given).unbind(dim=-2)

    def macs(self) -> int:
        """Multiply-adds of one sample."""
        return 0 if self.own is None else self.own.macs()
