"""Smoothing: input channels are divided by a factor that the weight is multiplied with, around any other
scheme. SmoothQuant chooses the factor from ranges, PTQ4DiT from ranges over the times of a sampler.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effformer import registry
from effformer.config import Config, part
from effformer.values import Fraction

from .calibrate import Seen, Want
from .schemes import Kernel, Layout, Scheme, Tensors
from .symmetric import W8A8

__all__ = ["PTQ4DiT", "SmoothQuant", "Smoothed", "SmoothedConfig", "spearman", "time_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothedConfig(Config):
    """Knobs of every smoothing scheme.

    Attributes:
        scheme: how the smoothed weight is stored.
        fold: where a norm or a modulation feeds only the layers in question, it takes the division;
            elsewhere, or with False, the layer divides its inputs.
    """

    scheme: Config = part("quantizer", W8A8.Config())
    fold: bool = True


class Smoothed(Scheme):
    """``(x / s) (W s)^T``, with ``W s`` in the inner scheme.

    Args:
        config: the knobs.
    """

    by_row = False
    own: tuple[Want, ...] = ()
    prepares = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner: Scheme = config.scheme.build()
        self.bits, self.step = self.inner.bits, self.inner.step
        self.wants = tuple(dict.fromkeys((*self.own, *self.inner.wants)))

    @abstractmethod
    def scale(self, weight: Tensor, seen: Seen) -> Tensor:
        """The factor s (K,) of a weight (N, K), that of all readers of one input stacked."""

    def weight_for(self, weight: Tensor, seen: Seen | None) -> Tensor:
        """The smoothed weight as it is handed to the inner scheme."""
        return weight

    def layout(self, n: int, k: int) -> Layout:
        return self.inner.layout(n, k) | {"smooth": ((k,), torch.float32)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return self.fit(weight, None)

    def fit(self, weight: Tensor, seen: Seen | None) -> dict[str, Tensor]:
        s = torch.ones(weight.shape[1], device=weight.device)
        if seen is not None:
            s = self.scale(weight, seen).to(weight.device)
        return self.fit_smoothed(weight * s, None if seen is None else seen.scaled(s)) | {
            "smooth": s.float()
        }

    def fit_smoothed(self, weight: Tensor, seen: Seen | None) -> dict[str, Tensor]:
        """The inner scheme's tensors of a weight that is smoothed, for inputs that are."""
        return self.inner.fit(self.weight_for(weight, seen), seen)

    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        return self.inner.decode(tensors, n, k) / tensors["smooth"].float()

    def base(self, tensors: Tensors, n: int, k: int) -> Tensor:
        return self.inner.base(tensors, n, k)

    def prepare(self, x: Tensor, tensors: Tensors) -> Tensor:
        return self.inner.prepare(self._smoothed(x, tensors), tensors)

    def linear(self, x: Tensor, tensors: Tensors, n: int, k: int) -> Tensor:
        return self.inner.linear(self._smoothed(x, tensors), tensors, n, k)

    def _smoothed(self, x: Tensor, tensors: Tensors) -> Tensor:
        return x * (1.0 / tensors["smooth"].float()).to(x.dtype)

    def macs(self, n: int, k: int) -> int:
        return self.inner.macs(n, k)

    def of_table(self) -> Scheme:
        return self.inner.of_table()

    def kernel(self, tensors: Tensors, n: int, k: int) -> Kernel | None:
        return self.inner.kernel(tensors, n, k)


@registry.quantizer.register("smoothquant", paper="2211.10438")
class SmoothQuant(Smoothed):
    """Outliers of inputs move into the weight: ``s = max|x|^alpha / max|w|^(1 - alpha)``.

    Around int8 weights and inputs unless ``scheme`` says otherwise.

    Reference: SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
        2022, arXiv 2211.10438.
    """

    name, own = "smoothquant", ("peak",)
    config: SmoothQuant.Config

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(SmoothedConfig):
        """Knobs of `SmoothQuant`, beside `SmoothedConfig`.

        Attributes:
            alpha: how much moves; 0 nothing of the inputs' ranges, 1 all.
        """

        alpha: Fraction = 0.5

    def scale(self, weight: Tensor, seen: Seen) -> Tensor:
        assert seen.peak is not None
        alpha, columns = self.config.alpha, weight.float().abs().amax(0).clamp(min=1e-5)
        scale = seen.peak.to(columns.device) ** alpha / columns ** (1 - alpha)
        return scale.clamp(min=1e-5)


@registry.quantizer.register("ptq4dit", paper="2405.16005")
class PTQ4DiT(Smoothed):
    """Smoothing of diffusion transformers: ranges of the inputs at several times count the more, the
    less their order agrees with that of the weight's.

    With a_t the largest ``|x|`` of every channel in a part of the time axis and w that of the weight::

        p = softmax(-spearman(a_t, w)),   s = sqrt(sum_t p_t a_t / w)

    Calibration data should come from the sampler itself (`effformer.compress.recording`).

    Differs from the paper: parts of the time axis instead of single steps; the division is folded
    where it can be.

    Reference: PTQ4DiT: Post-training Quantization for Diffusion Transformers, 2024, arXiv 2405.16005.
    """

    name, own = "ptq4dit", ("times", "peak")

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(SmoothedConfig):
        """Knobs of `PTQ4DiT`: those of `SmoothedConfig`."""

    def scale(self, weight: Tensor, seen: Seen) -> Tensor:
        assert seen.times is not None
        salience, columns = seen.saliences(), weight.detach().float().abs().amax(0).cpu()
        weights = time_weights(salience, columns)
        aggregated = (weights[:, None] * salience.double()).sum(0)
        return (aggregated / (columns.double() + 1e-8)).sqrt().float().clamp(min=1e-5)


def time_weights(salience: Tensor, columns: Tensor) -> Tensor:
    """``softmax(-spearman(a_t, w))``: salience (T, K) and columns (K,) to (T,) float64."""
    rho = torch.stack([spearman(one, columns) for one in salience])
    return torch.softmax(-rho, dim=0)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of two vectors (K,), float64; equal values have the mean of their ranks."""
    ranks = [_ranks(x) for x in (a, b)]
    x, y = (r - r.mean() for r in ranks)
    size = (x.square().sum() * y.square().sum()).sqrt()
    return (x * y).sum() / size if float(size) > 0 else size


def _ranks(x: Tensor) -> Tensor:
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]
