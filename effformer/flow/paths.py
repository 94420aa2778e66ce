"""Paths between noise and data, and the algebra of what a network may predict on them.

Every path is ``x_t = alpha(t) x1 + sigma(t) x0`` with x0 ~ N(0, I), t = 0 noise and t = 1 data.
Where (sigma, alpha) and their derivatives are known, velocity, noise, score and data are linear
functions of each other and of x_t.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from effformer.values import Chance, Count, NonNegative, Positive, Range

from ..checks import unknown
from ..config import Config

__all__ = [
    "DDPM", "GVP", "PATHS", "VP", "EndPoints", "Linear", "Path", "PathSample", "Prediction",
    "VariancePreserving", "expand", "get_path", "time_interval", "widened",
]  # fmt: skip

Prediction = Literal["velocity", "noise", "score", "data"]

_FLOOR = 1e-4
"""Smallest alpha or sigma that is divided by: noise says nothing about data at t = 0, nor data
about noise at t = 1.
"""


def expand(t: Tensor, x: Tensor) -> Tensor:
    """View times (B,) as (B, 1, ..., 1) so that they multiply ``x`` (B, ...)."""
    return t.reshape(-1, *(1,) * (x.dim() - 1))


def widened(x: Tensor) -> Tensor:
    """In float32 at least: what a network answers in half precision is added up exactly."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class PathSample:
    """A point of a path.

    Attributes:
        x: x_t = alpha x1 + sigma x0, the shape of x1.
        velocity: u_t = alpha' x1 + sigma' x0, the regression target of a velocity network.
    """

    x: Tensor
    velocity: Tensor


@dataclass(frozen=True, slots=True)
class EndPoints:
    """Both ends of the path through a point: the noise x0 and the data x1."""

    noise: Tensor
    data: Tensor


class Path(Config):
    """Base of all paths: x_t = alpha(t) x1 + sigma(t) x0 on t in [0, 1], t = 0 noise, t = 1 data.

    Subclasses give ``alpha``, ``sigma`` and their derivatives; the rest follows. Coefficients have
    the shape of t; the other methods take t (B,) beside x (B, ...).

    Reference: SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
    Transformers, 2024, arXiv 2401.08740.
    """

    name: ClassVar[str]

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha in t."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma in t."""

    def ratio(self, t: Tensor) -> Tensor:
        """The ratio r = alpha' / alpha; infinite where alpha is 0."""
        return self.dalpha(t) / self.alpha(t)

    def gain(self, t: Tensor) -> Tensor:
        """The gain g = r sigma^2 - sigma sigma', so that velocity = r x + g score."""
        sigma = self.sigma(t)
        return self.ratio(t) * sigma**2 - sigma * self.dsigma(t)

    def plan(self, t: Tensor, x1: Tensor, x0: Tensor) -> PathSample:
        """Interpolate: the point x_t and its velocity for the pair (noise x0, data x1)."""
        point = expand(self.alpha(t), x1) * x1 + expand(self.sigma(t), x1) * x0
        velocity = expand(self.dalpha(t), x1) * x1 + expand(self.dsigma(t), x1) * x0
        return PathSample(point, velocity)

    def ends(self, value: Tensor, x: Tensor, t: Tensor, kind: Prediction = "velocity") -> EndPoints:
        """Noise and data of the path through ``x`` according to a prediction.

        From a velocity, with the Wronskian W = alpha' sigma - alpha sigma':
        ``x0 = (alpha' x - alpha v) / W``, ``x1 = (sigma v - sigma' x) / W``; W does not vanish at
        the ends.

        Args:
            value: what the network said, the shape of ``x``.
            x: the point (B, ...).
            t: its times (B,).
            kind: what ``value`` is.
        """
        if kind == "velocity":
            return self._ends_of_velocity(value, x, t)
        alpha, sigma = expand(self.alpha(t), x), expand(self.sigma(t), x)
        if kind == "data":
            return EndPoints((x - alpha * value) / sigma.clamp_min(_FLOOR), value)
        noise = value if kind == "noise" else -sigma * value
        return EndPoints(noise, (x - sigma * noise) / alpha.clamp_min(_FLOOR))

    def convert(
        self, value: Tensor, x: Tensor, t: Tensor, source: Prediction, target: Prediction
    ) -> Tensor:
        """Turn one kind of prediction at (x, t) into another.

        ``velocity = alpha' x1 + sigma' x0``, ``score = -x0 / sigma``. Finite on the whole of [0,
        1]: alpha and sigma are kept above 1e-4 where the conversion divides by them (noise and
        score at t = 0, data at t = 1).

        Args:
            value: the prediction, the shape of ``x``.
            x: the point (B, ...).
            t: its times (B,).
            source: what ``value`` is.
            target: what is wanted.

        Raises:
            ValueError: unknown kind of prediction.
        """
        for kind in (source, target):
            if kind not in get_args(Prediction):
                raise unknown("prediction", str(kind), list(get_args(Prediction)))
        if source == target:
            return value
        ends = self.ends(value, x, t, source)
        if target == "velocity":
            return self.plan(t, ends.data, ends.noise).velocity
        if target == "score":
            return -ends.noise / expand(self.sigma(t), x).clamp_min(_FLOOR)
        return ends.noise if target == "noise" else ends.data

    def _ends_of_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> EndPoints:
        alpha, sigma, dalpha, dsigma = (
            expand(f(t), x) for f in (self.alpha, self.sigma, self.dalpha, self.dsigma)
        )
        wronskian = dalpha * sigma - alpha * dsigma
        return EndPoints((dalpha * x - alpha * v) / wronskian, (sigma * v - dsigma * x) / wronskian)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "") -> Self:
        """Build from plain values; ``"name"`` chooses the path when called on `Path` itself."""
        if cls is Path:
            rest = {k: v for k, v in data.items() if k != "name"}
            return _class(str(data.get("name")), where).from_dict(rest, where=where)  # type: ignore[return-value]
        return super().from_dict(data, where=where)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values with the name of the path."""
        return {"name": self.name} | super().to_dict()


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Path):
    """Rectified flow: alpha = t, sigma = 1 - (1 - s) t.

    Attributes:
        sigma_min: s, noise left at t = 1 (0 in rectified flow, 1e-5 in TRELLIS).

    Reference: Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow,
    2022, arXiv 2209.03003.
    """

    name: ClassVar[str] = "linear"
    sigma_min: Chance = 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.sigma_min) * t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_min - 1)


class GVP(Path):
    """Generalised variance preserving: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    name: ClassVar[str] = "gvp"

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(t * math.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.cos(t * math.pi / 2)

    def dalpha(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(t * math.pi / 2)

    def dsigma(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(t * math.pi / 2)


class VariancePreserving(Path):
    """Base of paths with alpha^2 + sigma^2 = 1 that are given by log alpha.

    Then g = r, ``x0 = sigma (x - v / r)`` and ``x1 = alpha x + sigma^2 v / (alpha r)``: no division
    by sigma, whose derivative is infinite at t = 1.
    """

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """Logarithm of alpha, at most 0."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def dalpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.ratio(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return -(self.alpha(t) ** 2) * self.ratio(t) / self.sigma(t).clamp_min(_FLOOR)

    def gain(self, t: Tensor) -> Tensor:
        return self.ratio(t)

    def _ends_of_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> EndPoints:
        alpha, sigma, ratio = (expand(f(t), x) for f in (self.alpha, self.sigma, self.ratio))
        return EndPoints(sigma * (x - v / ratio), alpha * x + sigma**2 / (alpha * ratio) * v)


@dataclass(frozen=True, slots=True, kw_only=True)
class VP(VariancePreserving):
    """Variance preserving diffusion in continuous time.

    ``log alpha = -(1 - t)^2 (beta1 - beta0) / 4 - (1 - t) beta0 / 2``; alpha(0) is 0.0066, not 0.

    Attributes:
        beta0: noise rate at the data end.
        beta1: noise rate at the noise end.

    Reference: Score-Based Generative Modeling through Stochastic Differential Equations, 2020,
    arXiv 2011.13456.
    """

    name: ClassVar[str] = "vp"
    beta0: NonNegative = 0.1
    beta1: Positive = 20.0

    def log_alpha(self, t: Tensor) -> Tensor:
        return -((1 - t) ** 2) * (self.beta1 - self.beta0) / 4 - (1 - t) * self.beta0 / 2

    def ratio(self, t: Tensor) -> Tensor:
        return (1 - t) * (self.beta1 - self.beta0) / 2 + self.beta0 / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DDPM(VariancePreserving):
    """A discrete diffusion schedule as a path in continuous time.

    Step n of ``steps`` stands at t = 1 - (n + 1) / steps and has exactly its alpha there; between
    steps log alpha is linear. t = 1 is clean data, one step before step 0.

    Attributes:
        steps: number of diffusion steps.
        beta_start: noise added by the first step.
        beta_end: noise added by the last step.
        schedule: "linear" betas, or "scaled-linear" (linear in sqrt(beta), Stable Diffusion).

    Reference: Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239.
    """

    name: ClassVar[str] = "ddpm"
    steps: Count = 1000
    beta_start: Annotated[float, Range(0, 1, above=True, below=True)] = 1e-4
    beta_end: Annotated[float, Range(0, 1, above=True, below=True)] = 2e-2
    schedule: Literal["linear", "scaled-linear"] = "linear"

    def log_alpha(self, t: Tensor) -> Tensor:
        table = torch.tensor(_ddpm_table(self), dtype=torch.float64).to(t)
        index, weight = self._locate(t)
        return table[index] + weight * (table[index + 1] - table[index])

    def ratio(self, t: Tensor) -> Tensor:
        table = torch.tensor(_ddpm_table(self), dtype=torch.float64).to(t)
        index, _ = self._locate(t)
        return self.steps * (table[index] - table[index + 1])

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        position = (1 - t) * self.steps
        index = position.detach().floor().long().clamp(0, self.steps - 1)
        return index, position - index


@functools.lru_cache(maxsize=8)
def _ddpm_table(path: DDPM) -> tuple[float, ...]:
    """Return log alpha after 0, 1, ..., steps noising steps.

    Numbers, not a tensor: a tensor made inside a trace would be a fake one ever after.
    """
    power = 1.0 if path.schedule == "linear" else 0.5
    ends = (path.beta_start**power, path.beta_end**power)
    betas = np.linspace(*ends, path.steps, dtype=np.float64) ** (1 / power)
    return (0.0, *(np.log1p(-betas).cumsum() / 2).tolist())


PATHS: dict[str, type[Path]] = {c.name: c for c in (Linear, GVP, VP, DDPM)}


def get_path(path: Path | str) -> Path:
    """Resolve a path by name ("linear", "gvp", "vp", "ddpm"); a `Path` is returned as it is.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a `Path`.
    """
    if isinstance(path, Path):
        return path
    if not isinstance(path, str):
        raise TypeError(f"path: expected a name or a Path, got {type(path).__name__}")
    return _class(path, "")()


def _class(name: str, where: str) -> type[Path]:
    if name not in PATHS:
        raise unknown("path", name, list(PATHS), where=where)
    return PATHS[name]


def time_interval(
    path: Path | str,
    prediction: Prediction = "velocity",
    *,
    stochastic: bool = False,
    sbdm: bool = False,
    last_step: float = 0.0,
    train: bool = False,
) -> tuple[float, float]:
    """Times between which nothing is infinite, as SiT chooses them.

    Args:
        path: the path.
        prediction: what the network answers.
        stochastic: an SDE is integrated, which needs the score.
        sbdm: its diffusion has the form "sbdm".
        last_step: width of a separate last step, which ends at t = 1.
        train: the interval is for training (variance preserving paths come closer to the data).

    Returns:
        (low, high): for `TimeGrid.uniform` or `Uniform`.

    Differs from the paper: its code starts "sbdm" with a velocity network at t = 0, where the
    diffusion is infinite on paths with alpha(0) = 0, and ends SDEs without a last step at t = 1.
    """
    if isinstance(get_path(path), VariancePreserving):
        return 0.0, 1 - (last_step or (1e-5 if train else 1e-3))
    indirect = prediction != "velocity"
    low = 1e-3 if indirect or (stochastic and sbdm) else 0.0
    return low, 1 - (last_step or 1e-3) if indirect or stochastic else 1.0
