"""GPTQ: columns are rounded one after the other, and those to come make up for the error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effformer import registry
from effformer.values import Count, Positive

from . import blockwise as bw
from .affine import Affine, AffineConfig, cut, grid, rounded
from .calibrate import Seen

__all__ = ["GPTQ", "loss_of_rows", "solve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQConfig(AffineConfig):
    """Knobs of `GPTQ`.

    Attributes:
        damp: added to the diagonal of the second moments, as a share of its mean.
        order: columns with larger inputs are rounded first; the grids of all blocks are then fixed
            before.
        lazy: columns after which the rest of the weight is brought up to date; a grid is read from
            the weight as it was then.
    """

    damp: Positive = 0.01
    order: bool = False
    lazy: Count = 128


@registry.quantizer.register("gptq", paper="2210.17323")
class GPTQ(Affine):
    """Row blocks rounded column by column with the least error ``||(W - Q) X||`` on calibration data.

    With H = X X^T and U the upper Cholesky factor of its inverse, column j is rounded to q and the
    columns behind it change by ``-(w - q) / U_jj U_j``. A row for which rounding to nearest has the
    smaller error keeps that.

    Differs from the paper: the inputs are those of the dense model, gathered once.

    Reference: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022,
        arXiv 2210.17323.
    """

    name, wants = "gptq", ("second",)
    config: GPTQConfig

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(GPTQConfig):
        """Knobs of `GPTQ`; see `GPTQConfig`."""

    def fit(self, weight: Tensor, seen: Seen | None) -> dict[str, Tensor]:
        nearest = self.encode(weight)
        if seen is None or seen.second is None:
            return nearest
        n, k = weight.shape
        second = seen.second.to(weight.device)
        tensors = self._packed(solve(weight, second, self.config))
        error, plain = (
            loss_of_rows(self.decode(t, n, k) - weight.float(), second) for t in (tensors, nearest)
        )
        worse = (error > plain)[:, None]
        return {name: torch.where(worse, nearest[name], x) for name, x in tensors.items()}


def loss_of_rows(error: Tensor, second: Tensor) -> Tensor:
    """``sum over tokens of (e x)^2`` of every row e of (N, K), from the sum of ``x x^T``."""
    return ((error @ second) * error).sum(1)


def solve(weight: Tensor, second: Tensor, config: GPTQConfig) -> bw.RowBlocks:
    """The codes of GPTQ.

    Args:
        weight: (N, K), finite.
        second: (K, K), sum of ``x x^T`` up to a factor.
        config: grid and knobs.
    """
    n, k = weight.shape
    block = min(config.block or k, k)
    w = weight.float().clone()
    scale, zero = (x.squeeze(-1) for x in grid(cut(w, block), config))
    dead = second.diagonal() == 0
    w[:, dead] = 0
    moments = second.float().clone()
    moments.diagonal().add_(dead.float())
    order = torch.arange(k, device=w.device)
    if config.order:
        order = moments.diagonal().argsort(descending=True)
        moments, w = moments[order][:, order], w[:, order]
    upper = _factor(moments, config.damp)
    codes = torch.zeros_like(w)
    fixed = config.order or block == k
    for start in range(0, k, config.lazy):
        stop = min(start + config.lazy, k)
        now, errors = w[:, start:stop].clone(), torch.zeros(n, stop - start, device=w.device)
        for j in range(start, stop):
            place = int(order[j]) // block
            if not fixed and j % block == 0:
                found = grid(w[:, j : j + block], config)
                scale[:, place], zero[:, place] = (x.squeeze(-1) for x in found)
            column, i = now[:, j - start], j - start
            codes[:, j] = rounded(column, scale[:, place], zero[:, place], config.bits)
            q = (codes[:, j] - zero[:, place]) * scale[:, place]
            errors[:, i] = (column - q) / upper[j, j]
            now[:, i:] -= errors[:, i : i + 1] * upper[j, j:stop]
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    codes = codes[:, order.argsort()].to(torch.uint8)
    return bw.RowBlocks(codes, scale, None if config.symmetric else zero.to(torch.uint8))


def _factor(moments: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse; moments that are singular are damped more."""
    mean = moments.diagonal().mean()
    while True:
        damped = moments.clone()
        damped.diagonal().add_(damp * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            damped = torch.cholesky_inverse(lower)
            del lower  # matrices of this size are what the memory is needed for
            upper, info = torch.linalg.cholesky_ex(damped, upper=True)
            if not int(info) and bool(upper.isfinite().all()):
                return upper
        damp *= 10
