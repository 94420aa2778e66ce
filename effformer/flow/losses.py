"""Training losses of flows: regression of the velocity, or of another prediction, on a path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer.values import NonNegative, Positive

from .. import config as _config
from ..registry import loss as registry
from .conventions import FlowConvention, VelocityField
from .paths import Path, PathSample, Prediction, expand, get_path, widened
from .times import TimeLaw, get_time_law

__all__ = [
    "Distillation", "FlowMatching", "LossOutput", "PseudoHuber", "cosine_distance", "loss_weight",
]  # fmt: skip

Weight = Literal["none", "velocity", "likelihood"]
Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distance of two batches (B, ...), per sample (B,)."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What a loss returns.

    Attributes:
        loss: scalar, the mean over the batch.
        per_sample: (B,) losses.
        t: (B,) times.
        x: x_t, the network's input.
        prediction: the network's output.
        target: what it should have been.
    """

    loss: Tensor
    per_sample: Tensor
    t: Tensor
    x: Tensor
    prediction: Tensor
    target: Tensor


def loss_weight(path: Path, t: Tensor, weight: Weight) -> Tensor:
    """Weight of noise and score losses: none 1, velocity (g / sigma)^2, likelihood g / sigma^2."""
    if weight == "none":
        return torch.ones_like(t)
    gain, sigma = path.gain(t), path.sigma(t)
    return (gain / sigma) ** 2 if weight == "velocity" else gain / sigma**2


def cosine_distance(value: Tensor, target: Tensor) -> Tensor:
    """Per sample the mean of ``1 - cos(value, target)``, angles taken over channels (axis 1).

    Args:
        value: (B, C, ...).
        target: the same shape.

    Returns:
        (B,), in [0, 2], at least float32.
    """
    cosine = F.cosine_similarity(widened(value), widened(target), dim=1)
    return 1 - cosine.reshape(len(cosine), -1).mean(1)


class _Objective:
    """What the losses share: the path, drawing what was not given, asking the network."""

    def __init__(self, path: Path | str, time: TimeLaw | str) -> None:
        self.path = get_path(path)
        self.time = get_time_law(time)

    @property
    def convention(self) -> FlowConvention:
        """What a network trained with this loss answers: our time, told as it is, on the path."""
        return FlowConvention(data_at=1, path=self.path)

    @property
    def steps(self) -> int | None:
        """Number of equal steps that it distils a network to, None for any."""
        return self.time.steps

    def _draw(
        self,
        data: Tensor,
        noise: Tensor | None,
        t: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        if not data.is_floating_point():
            raise TypeError(f"loss: data is floating point, got {data.dtype}")
        if noise is None:
            source = data.device if generator is None else generator.device
            noise = torch.randn(data.shape, generator=generator, device=source, dtype=data.dtype)
        if noise.shape != data.shape:
            raise ValueError(
                f"loss: noise {tuple(noise.shape)} differs from data {tuple(data.shape)}"
            )
        if t is None:
            t = self.time.sample(data.shape[0], generator=generator, device=data.device)
        if t.shape != data.shape[:1]:
            raise ValueError(f"loss: expected t ({data.shape[0]},), got {tuple(t.shape)}")
        return noise.to(data.device), t.to(torch.promote_types(data.dtype, torch.float32))

    def _ask(
        self, network: VelocityField, data: Tensor, noise: Tensor, t: Tensor, cond: dict[str, Any]
    ) -> tuple[PathSample, Tensor]:
        """The point at t with its velocity, and what the network answers there."""
        point = self.path.plan(t, data, noise)
        value = network(point.x.to(data.dtype), t, **cond)
        if value.shape != data.shape:
            raise ValueError(
                f"loss: the network answered {tuple(value.shape)} for data {tuple(data.shape)}; "
                "a network that also predicts a variance becomes a velocity by effformer.flow.adapt"
            )
        return point, value


@registry.register("flow-matching", paper="2209.03003", aliases=("mse", "rectified-flow"))
class FlowMatching(_Objective):
    """Squared error on a path: rectified flow by default, SiT's losses by options.

    velocity: ``|net - (alpha' x1 + sigma' x0)|^2``; noise: ``w |net - x0|^2``; score: ``w |sigma
    net + x0|^2``; data: ``|net - x1|^2``. With x0 ~ N(0, I) this is the first flow; with pairs (x0,
    ODE(x0)) it is reflow. ``cosine`` adds the angle between answer and target, see
    `cosine_distance`; LightningDiT trains velocities with cosine = 1 and the time law logit-normal.

    Reference: Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow,
    2022, arXiv 2209.03003; SiT, 2024, arXiv 2401.08740; Reconstruction vs. Generation: Taming
    Optimization Dilemma in Latent Diffusion Models, 2025, arXiv 2501.01423 (cosine).
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Options.

        Attributes:
            path: the path.
            prediction: what the network answers.
            weight: w(t) of noise and score losses, see `loss_weight`.
            time: distribution of t.
            reduction: per sample, "mean" over all elements or "half-sum", 0.5 times their sum.
            cosine: weight of the cosine distance, not subject to ``weight``.
        """

        path: Path | str = "linear"
        prediction: Prediction = "velocity"
        weight: Weight = "none"
        time: TimeLaw | str = "uniform"
        reduction: Literal["mean", "half-sum"] = "mean"
        cosine: NonNegative = 0.0

    def __init__(self, config: Config) -> None:
        super().__init__(config.path, config.time)
        self.config = config
        if config.weight != "none" and config.prediction not in ("noise", "score"):
            raise ValueError(
                f"flow-matching: weight={config.weight!r} needs prediction 'noise' or 'score', "
                f"not {config.prediction!r}"
            )
        if config.cosine < 0:
            raise ValueError(f"flow-matching: cosine must be at least 0, got {config.cosine}")

    @property
    def convention(self) -> FlowConvention:
        return FlowConvention(data_at=1, path=self.path, prediction=self.config.prediction)

    def __call__(
        self,
        network: VelocityField,
        data: Tensor,
        *,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        generator: torch.Generator | None = None,
        **cond: Any,
    ) -> LossOutput:
        """Evaluate the loss.

        Args:
            network: called as ``network(x_t, t, **cond)``, t = 0 noise, t = 1 data.
            data: x1 (B, ...).
            noise: x0, drawn if None. Reflow passes the noise that each sample was generated from.
            t: times (B,), drawn if None.
            generator: randomness of what is drawn.
            cond: conditions of the network.

        Raises:
            ValueError: shapes that do not fit.
        """
        noise, t = self._draw(data, noise, t, generator)
        point, value = self._ask(network, data, noise, t, cond)
        kind = self.config.prediction
        if kind == "score":
            target, error = -noise, expand(self.path.sigma(t), data) * value + noise
        else:
            target = {"velocity": point.velocity, "noise": noise, "data": data}[kind]
            error = widened(value) - target
        squares = _squares(error)
        per_sample = squares.mean(1) if self.config.reduction == "mean" else 0.5 * squares.sum(1)
        per_sample = loss_weight(self.path, t, self.config.weight) * per_sample
        if self.config.cosine:
            per_sample = per_sample + self.config.cosine * cosine_distance(value, target)
        return LossOutput(per_sample.mean(), per_sample, t, point.x, value, target)


@registry.register("pseudo-huber", paper="2405.20320")
class PseudoHuber(_Objective):
    """Pseudo-Huber distance of velocities, for reflow on generated pairs.

    Per sample ``(sqrt(|v - u|^2 + c^2) - c) / d`` with the squared norm over all d elements and c =
    ``factor`` d: quadratic for small errors, linear for large ones.

    Reference: Improving the Training of Rectified Flows, 2024, arXiv 2405.20320.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Options.

        Attributes:
            path: the path.
            time: distribution of t.
            factor: c / d.
        """

        path: Path | str = "linear"
        time: TimeLaw | str = "u-shaped"
        factor: Positive = 0.00054

    def __init__(self, config: Config) -> None:
        super().__init__(config.path, config.time)
        self.config = config
        if not config.factor > 0:
            raise ValueError(f"pseudo-huber: factor must be positive, got {config.factor}")

    def __call__(
        self,
        network: VelocityField,
        data: Tensor,
        *,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        generator: torch.Generator | None = None,
        **cond: Any,
    ) -> LossOutput:
        """Evaluate the loss; arguments as `FlowMatching.__call__`."""
        noise, t = self._draw(data, noise, t, generator)
        point, value = self._ask(network, data, noise, t, cond)
        squares = _squares(value - point.velocity)
        size = squares.shape[1]
        c = self.config.factor * size
        norm = squares.sum(1)
        # sqrt(n + c^2) - c without the cancellation of two nearly equal numbers
        per_sample = norm / (torch.sqrt(norm + c * c) + c) / size
        return LossOutput(per_sample.mean(), per_sample, t, point.x, value, point.velocity)


@registry.register("distillation", paper="2209.03003")
class Distillation(_Objective):
    """One-step distillation of a flow from its own pairs (noise, generated data).

    At t = ``time`` (1e-3) the network's straight line from the noise, ``x0 + v(x_t, t)``, is
    compared with the data: per sample ``l2 mean |v - (x1 - x0)|^2 + perceptual D(x0 + v, x1)``.

    Distillation to k steps is `FlowMatching` with the time law ``k-step``.

    Reference: Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow,
    2022, arXiv 2209.03003.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Options.

        Attributes:
            time: the time law; the default is t = 1e-3 alone.
            l2: weight of the squared error of velocities.
            perceptual: weight of the perceptual distance.
        """

        time: TimeLaw | str = "fixed"
        l2: NonNegative = 1.0
        perceptual: NonNegative = 0.0

    def __init__(self, config: Config, perceptual: Perceptual | None = None) -> None:
        super().__init__("linear", config.time)
        self.config = config
        self.perceptual = perceptual
        if config.perceptual and perceptual is None:
            raise ValueError(
                f"distillation: perceptual={config.perceptual} needs a distance: "
                "Distillation(config, perceptual=lambda a, b: ...) with values (B,)"
            )
        if not config.perceptual and not config.l2:
            raise ValueError("distillation: both weights are 0; give l2 or perceptual a weight")

    def __call__(
        self,
        network: VelocityField,
        data: Tensor,
        *,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        generator: torch.Generator | None = None,
        **cond: Any,
    ) -> LossOutput:
        """Evaluate the loss; as `FlowMatching.__call__`, with the noise that data was made from.

        Raises:
            ValueError: there is no noise, or shapes that do not fit.
        """
        if noise is None:
            raise ValueError(
                "distillation: the noise that every sample was generated from is missing; give noise, "
                "in training as the tensor 'noise' of the data set"
            )
        noise, t = self._draw(data, noise, t, generator)
        point, value = self._ask(network, data, noise, t, cond)
        per_sample = self.config.l2 * _squares(value - point.velocity).mean(1)
        if self.config.perceptual and self.perceptual is not None:
            distance = self.perceptual(noise + value, data)
            if distance.shape != data.shape[:1]:
                raise ValueError(
                    f"distillation: perceptual gave {tuple(distance.shape)}, "
                    f"expected ({data.shape[0]},)"
                )
            per_sample = per_sample + self.config.perceptual * distance
        return LossOutput(per_sample.mean(), per_sample, t, point.x, value, point.velocity)


def _squares(error: Tensor) -> Tensor:
    """(B, d) squares of all elements, at least float32."""
    return widened(error).square().flatten(1)
