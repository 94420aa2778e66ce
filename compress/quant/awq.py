"""AWQ: a smoothing factor and clipping that are searched on the error of the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer import registry
from effformer.config import Config, part
from effformer.values import Count

from .affine import Affine
from .calibrate import Seen
from .gptq import loss_of_rows
from .smooth import Smoothed, SmoothedConfig

__all__ = ["AWQ", "clip", "search"]

_STEPS = 20
_DEEPEST = 10  # a block is clipped to no less than half of its largest value


def search(
    mean: Tensor, loss: Callable[[Tensor], float], steps: int = _STEPS
) -> tuple[Tensor, int]:
    """The best factor among ``mean^(i / steps)``, and its i; the first of equal ones.

    Args:
        mean: mean of ``|x|`` per channel (K,).
        loss: of a factor (K,).
        steps: number of exponents from 0 on.
    """
    best, found, index = float("inf"), torch.ones_like(mean), 0
    for i in range(steps):
        s = mean.pow(i / steps).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        error = loss(s)
        if error < best:
            best, found, index = error, s, i
    return found, index


def clip(
    weight: Tensor, second: Tensor, block: int | None, round_to: Callable[[Tensor], Tensor]
) -> Tensor:
    """Largest magnitude of every block (N, blocks) that gives the least error of its share of the output.

    Args:
        weight: (N, K).
        second: (K, K), sum of ``x x^T``.
        block: values per block, None for whole rows.
        round_to: a weight (N, K) to its decoded codes.
    """
    k = weight.shape[1]
    block = min(block or k, k)
    pad = -k % block
    moments = F.pad(second.double(), (0, pad, 0, pad)).unflatten(0, (-1, block))
    moments = moments.unflatten(2, (-1, block))
    own = torch.stack([moments[i, :, i] for i in range(moments.shape[0])])
    top = F.pad(weight.abs(), (0, pad)).unflatten(1, (-1, block)).amax(-1)
    best, found = torch.full(top.shape, float("inf"), dtype=torch.float64), top.clone()
    for i in range(_DEEPEST):
        bound = top * (1 - i / _STEPS)
        error = round_to(clamped(weight, bound, block)) - weight
        error = F.pad(error.double(), (0, pad)).unflatten(1, (-1, block))
        loss = (torch.einsum("nbi,bij->nbj", error, own.to(error)) * error).sum(-1)
        better = loss < best.to(loss)
        best, found = torch.where(better, loss, best.to(loss)), torch.where(better, bound, found)
    return found


def clamped(weight: Tensor, bound: Tensor, block: int | None) -> Tensor:
    """A weight (N, K) within the bounds (N, blocks) of its blocks."""
    k = weight.shape[1]
    wide = bound.repeat_interleave(min(block or k, k), dim=1)[:, :k]
    return torch.minimum(torch.maximum(weight, -wide), wide)


@registry.quantizer.register("awq", paper="2306.00978")
class AWQ(Smoothed):
    """Weights of channels with large inputs are scaled up before they are rounded: ``s =
    mean|x|^alpha``, alpha searched on the error of the layer's output, then every block clipped.

    The error over all calibration tokens comes from their second moments, so that none is kept. Rounding
    without factor and clipping is among the candidates.

    Differs from the paper: layers that read one input are judged together on their own outputs instead
    of that of the module around them; queries and keys are clipped, too.

    Reference: AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2023,
        arXiv 2306.00978.
    """

    name, own = "awq", ("mean", "second")
    config: AWQ.Config

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(SmoothedConfig):
        """Knobs of `AWQ`, beside `SmoothedConfig`.

        Attributes:
            steps: exponents that are tried.
            clip: search a bound of every block, too.
        """

        scheme: Config = part("quantizer", Affine.Config())
        steps: Count = _STEPS
        clip: bool = True

    def scale(self, weight: Tensor, seen: Seen) -> Tensor:
        assert seen.second is not None
        w, second = weight.detach().float(), seen.second.to(weight.device)

        def loss(s: Tensor) -> float:
            return float(loss_of_rows(self._nearest(w * s) / s - w, second).sum())

        return search(seen.mean.to(weight.device), loss, self.config.steps)[0]

    def weight_for(self, weight: Tensor, seen: Seen | None) -> Tensor:
        if seen is None or seen.second is None or not self.config.clip:
            return weight
        block = getattr(self.inner.config, "block", None)
        w = weight.detach().float()
        bound = clip(w, seen.second.to(w.device), block, self._nearest)
        return clamped(w, bound, block).to(weight.dtype)

    def _nearest(self, weight: Tensor) -> Tensor:
        n, k = weight.shape
        return self.inner.decode(self.inner.encode(weight), n, k)
