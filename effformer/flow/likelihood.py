"""Normalizing flows: exact densities, and the loss that maximises them.

A normalizing flow turns data into latents that are distributed as N(0, I), and knows by how much it
stretches volumes: ``log p(x) = log N(z; 0, I) + log |det dz/dx|``.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from .. import config as _config
from ..arguments import Shape, checked
from ..checks import check_shape
from ..registry import loss as registry
from ..values import Count, NonNegative, Real
from ..wrapped import bare, unwrapping
from .paths import widened

__all__ = [
    "Density", "Likelihood", "LikelihoodOutput", "NormalizingFlow", "bits_per_dim", "denoised", "log_likelihood",
]  # fmt: skip

Data = Annotated[Tensor, Shape("(B, C, ...)")]


class Density(Protocol):
    """What a normalizing flow answers.

    Attributes:
        z: latents, of the shape of the data.
        log_det: (B,) log |det dz/dx|.
    """

    @property
    def z(self) -> Tensor: ...

    @property
    def log_det(self) -> Tensor: ...


class NormalizingFlow(Protocol):
    """Called as ``model(x, **cond)`` with data x (B, ...)."""

    def __call__(self, x: Tensor, /, **cond: Any) -> Density: ...


@dataclass(frozen=True, slots=True)
class LikelihoodOutput:
    """What `Likelihood` returns.

    Attributes:
        loss: scalar, the mean over the batch.
        per_sample: (B,) losses.
        x: data as the network saw them.
        z: their latents.
        log_det: (B,) log |det dz/dx|.
    """

    loss: Tensor
    per_sample: Tensor
    x: Tensor
    z: Tensor
    log_det: Tensor


@registry.register("likelihood", paper="2412.06329")
class Likelihood:
    """Negative log-likelihood of a normalizing flow, per number and without the constant ``log sqrt(2
    pi)``: ``mean z^2 / 2 - log |det dz/dx| / d`` with d numbers in a sample.

    The data get Gaussian noise, without which the density of pixels has no bound (0.05 for images of
    64 x 64, 0.15 of 128 x 128, 0.3 for STARFlow's latents); `denoised` takes it out of samples. To
    report bits per dimension the published models are trained on ``levels=256`` instead.

    Reference: Normalizing Flows are Capable Generative Models, 2024, arXiv 2412.06329.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Options.

        Attributes:
            noise: standard deviation of what is added to the data.
            levels: the data are whole levels, this many between -1 and 1, which get uniform noise of
                the width of one; None: they are not.
        """

        noise: NonNegative = 0.05
        levels: Count | None = None

        def check(self) -> None:
            if self.levels is not None and self.noise:
                raise ValueError(
                    f"likelihood: levels={self.levels} get uniform noise; noise must then be 0, not "
                    f"{self.noise}"
                )

    def __init__(self, config: Config) -> None:
        self.config = config

    @checked
    def __call__(
        self,
        network: NormalizingFlow,
        data: Data,
        *,
        generator: torch.Generator | None = None,
        **cond: Any,
    ) -> LikelihoodOutput:
        """Evaluate the loss.

        Args:
            network: called as ``network(x, **cond)``.
            data: (B, C, ...).
            generator: randomness of the noise.
            cond: conditions of the network.

        Raises:
            TypeError: the network is no normalizing flow.
        """
        if "t" in inspect.signature(getattr(bare(network), "forward", network)).parameters:
            raise TypeError(
                f"likelihood: {type(network).__name__} is asked for times, a normalizing flow is not; "
                "loss='flow-matching' trains it, and likelihood trains TarFlow and STARFlow"
            )
        x = self._noisy(data, generator)
        found = _asked(network, x, cond, where="likelihood")
        per_sample = -_log_density(found, constant=False) / math.prod(x.shape[1:])
        return LikelihoodOutput(per_sample.mean(), per_sample, x, found.z, found.log_det)

    def _noisy(self, data: Tensor, generator: torch.Generator | None) -> Tensor:
        config = self.config
        device = data.device if generator is None else generator.device
        draw = torch.randn if config.levels is None else torch.rand
        noise = draw(data.shape, generator=generator, device=device, dtype=data.dtype)
        noise = noise.to(data.device)
        if config.levels is None:
            return data + config.noise * noise
        level = ((data + 1) * ((config.levels - 1) / 2)).round()
        return 2 * (level + noise) / config.levels - 1


@unwrapping
@checked
def log_likelihood(model: NormalizingFlow, x: Data, **cond: Any) -> Tensor:
    """Log-likelihood log p(x) of every sample in nats, exactly.

    Args:
        model: a normalizing flow, such as `effformer.models.TarFlow`.
        x: (B, C, ...) data.
        cond: conditions of the model. A classifier takes the class under which a sample is likeliest.

    Returns:
        (B,).

    Raises:
        TypeError: the model is no normalizing flow.
    """
    return _log_density(_asked(model, x, cond, where="log_likelihood"), constant=True)


@unwrapping
@checked
def bits_per_dim(
    model: NormalizingFlow,
    x: Data,
    *,
    levels: Count = 256,
    value_range: tuple[Real, Real] = (-1.0, 1.0),
    **cond: Any,
) -> Tensor:
    """Bits per number that a code by the model spends on every sample of whole levels: ``(log((high -
    low) / levels) d + log p(x)) / (-d log 2)``.

    Args:
        model: a normalizing flow.
        x: (B, C, ...) data, dequantised: level k stands for values between k and k + 1 of ``levels``.
        levels: number of levels.
        value_range: values of the lowest edge of the first level and the highest of the last one.
        cond: conditions of the model.

    Returns:
        (B,).

    Raises:
        ValueError: the range is empty.
    """
    low, high = value_range
    if low >= high:
        raise ValueError(f"bits_per_dim: value_range must increase, got {low} and {high}")
    density = _log_density(_asked(model, x, cond, where="bits_per_dim"), constant=True)
    return (math.log(levels / (high - low)) - density / math.prod(x.shape[1:])) / math.log(2)


@unwrapping
@checked
def denoised(
    model: NormalizingFlow, x: Data, noise: NonNegative, *, strength: Real = 1.0, **cond: Any
) -> Tensor:
    """Take Gaussian noise out of data or samples of a model that was trained with it, by the score:
    ``x + strength noise^2 grad log p(x)`` (Tweedie's formula).

    Args:
        model: a normalizing flow.
        x: (B, C, ...).
        noise: standard deviation of the noise; 0 changes nothing.
        strength: 0.9 to 1.4 in published samples.
        cond: conditions of the model.

    Returns:
        (B, C, ...).

    Reference: Normalizing Flows are Capable Generative Models, 2024, arXiv 2412.06329.
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        total = _log_density(_asked(model, leaf, cond, where="denoised"), constant=False).sum()
        (score,) = torch.autograd.grad(total, leaf)
    return x.detach() + strength * noise**2 * score


def _asked(model: NormalizingFlow, x: Tensor, cond: dict[str, Any], *, where: str) -> Density:
    found = model(x, **cond)
    if not (hasattr(found, "z") and hasattr(found, "log_det")):
        name = getattr(model, "name", type(model).__name__)
        raise TypeError(
            f"{where}: {name} is no normalizing flow, whose answer has z and log_det; "
            "effformer.models.TarFlow and STARFlow are"
        )
    check_shape(found.log_det, f"({len(x)},)", (len(x),), where=f"{where}: log_det of the model")
    return found


def _log_density(found: Density, *, constant: bool) -> Tensor:
    """(B,) log N(z; 0, I) + log_det."""
    z = widened(found.z).flatten(1)
    rest = 0.5 * math.log(2 * math.pi) * z.shape[1] if constant else 0.0
    return widened(found.log_det) - 0.5 * z.square().sum(dim=1) - rest
