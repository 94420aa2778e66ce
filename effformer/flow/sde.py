"""Stochastic samplers: noise that does not change the marginals of a flow."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effformer.arguments import checked
from effformer.values import Chance, NonNegative

from .. import config as _config
from ..registry import sampler as registry
from .conventions import batch_times
from .paths import Clock, Path, get_path, time_interval
from .samplers import Run, Sampler
from .times import TimeGrid

__all__ = ["DiffusionForm", "SDEEuler", "SDEHeun", "StochasticEuler", "diffusion_coefficient"]

DiffusionForm = Literal[
    "constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"
]
LastStep = Literal["mean", "euler", "tweedie", "none"]


@checked
def diffusion_coefficient(
    path: Path, t: Clock, form: DiffusionForm, norm: NonNegative = 1.0
) -> Tensor:
    """Diffusion coefficient w(t) of ``dX = (v + w s) dt + sqrt(2 w) dW``.

    The marginals are the same for every w >= 0.

    With c = ``norm``: constant c; sbdm c g(t); sigma c sigma(t); linear c (1 - t);
    decreasing (c cos(pi t) + 1)^2 / 4; increasing-decreasing c sin^2(pi t).

    Args:
        path: the path, which gives g and sigma.
        t: times, any shape; the result has the same.
        form: the shape of w. sbdm is infinite at t = 0 on paths with alpha(0) = 0.
        norm: the factor c.

    Reference: SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
    Transformers, 2024, arXiv 2401.08740. Its paper writes w for twice this w.
    """
    if form == "constant":
        return torch.full_like(t, norm)
    if form == "sbdm":
        return norm * path.gain(t)
    if form == "sigma":
        return norm * path.sigma(t)
    if form == "linear":
        return norm * (1 - t)
    if form == "decreasing":
        return (norm * torch.cos(math.pi * t) + 1) ** 2 / 4
    return norm * torch.sin(math.pi * t) ** 2


class _SDE(Sampler):
    """What the SDE samplers share: coefficients, the grid, the last step."""

    reversible = False

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options(_config.Config):
        """Options of the SDE samplers.

        Attributes:
            path: the path that the velocity belongs to; it turns velocity into score.
            form: shape of the diffusion coefficient, see `diffusion_coefficient`.
            norm: its factor.
            last_step: the noiseless last step: "mean" (velocity and score), "euler" (velocity),
                "tweedie" (the expected data), or "none".
            last_step_size: width of the last step; the grid ends this much before t = 1.
        """

        path: Path | str = "linear"
        form: DiffusionForm = "sigma"
        norm: NonNegative = 1.0
        last_step: LastStep = "mean"
        last_step_size: Chance = 0.04

    def __init__(self, config: Options) -> None:
        super().__init__(config)
        self.options = config
        self.path = get_path(config.path)
        self._last_width = 0.0 if config.last_step == "none" else config.last_step_size

    def grid(self, steps: int) -> TimeGrid:
        """``steps`` steps in all, the last step included."""
        options, last = self.options, self._last_width
        low, high = time_interval(
            self.path, stochastic=True, sbdm=options.form == "sbdm", last_step=last
        )
        if last and steps < 2:
            raise ValueError(f"sample: an SDE with a last step needs steps >= 2, got {steps}")
        return TimeGrid.uniform(steps - 1 if last else steps, low, high)

    def integrate(self, run: Run, x: Tensor, grid: TimeGrid) -> Tensor:
        last = self._last_width
        if grid.end + last > 1 + 1e-6:
            raise ValueError(
                f"sample: the grid ends at {grid.end:.6g} and the last step adds {last:.6g}; "
                f"end the grid at {1 - last:.6g} or set last_step='none'"
            )
        run.total = len(grid) + (last > 0)
        for (t, dt), t_next in zip(grid, grid.points[1:], strict=True):
            x = self.step(run, x, t, dt)
            run.record(x, t_next)
        if last:
            x = self._last(run, x, grid.end)
            run.record(x, grid.end + last)
        return x

    @abstractmethod
    def step(self, run: Run, x: Tensor, t: float, dt: float) -> Tensor:
        """One noisy step of width dt from time t."""

    def drift(self, run: Run, x: Tensor, t: float) -> Tensor:
        """The drift v + w s."""
        v = run.field(x, t)
        score = self.path.convert(v, x, batch_times(t, x), "velocity", "score")
        return torch.add(v, score, alpha=self.coefficient(t))

    def coefficient(self, t: float) -> float:
        """w(t).

        Raises:
            ValueError: it is infinite.
        """
        options = self.options
        time = torch.tensor(t, dtype=torch.float64)
        w = float(diffusion_coefficient(self.path, time, options.form, options.norm))
        if not math.isfinite(w):
            raise ValueError(
                f"sample: the {options.form} diffusion is infinite at t={t:.6g}; "
                "start the grid at 0.001"
            )
        return w

    def _last(self, run: Run, x: Tensor, t: float) -> Tensor:
        size = self.options.last_step_size
        if self.options.last_step == "mean":
            return torch.add(x, self.drift(run, x, t), alpha=size)
        v = run.field(x, t)
        if self.options.last_step == "euler":
            return torch.add(x, v, alpha=size)
        return self.path.convert(v, x, batch_times(t, x), "velocity", "data")


@registry.register("sde-euler", paper="2401.08740", aliases=("euler-maruyama",))
class SDEEuler(_SDE):
    """Euler-Maruyama: x += (v + w s) dt + sqrt(2 w dt) z, one evaluation per step."""

    class Config(_SDE.Options):
        """Options of the SDE samplers."""

    def step(self, run: Run, x: Tensor, t: float, dt: float) -> Tensor:
        spread = math.sqrt(2 * self.coefficient(t) * dt)
        moved = torch.add(x, self.drift(run, x, t), alpha=dt)
        return torch.add(moved, run.noise(x), alpha=spread)


@registry.register("sde-heun", paper="2401.08740")
class SDEHeun(_SDE):
    """Stochastic Heun: noise, then a trapezoidal step of the drift; two evaluations per step."""

    class Config(_SDE.Options):
        """Options of the SDE samplers."""

    def step(self, run: Run, x: Tensor, t: float, dt: float) -> Tensor:
        spread = math.sqrt(2 * self.coefficient(t) * dt)
        shaken = torch.add(x, run.noise(x), alpha=spread)
        k1 = self.drift(run, shaken, t)
        k2 = self.drift(run, torch.add(shaken, k1, alpha=dt), t + dt)
        return torch.add(shaken, k1 + k2, alpha=dt / 2)


@registry.register("stochastic-euler", paper="2209.03003")
class StochasticEuler(Sampler):
    """Rectified flow with noise g(t) = sigma (1 - t): dX = (v + g^2/2 score) dt + g dW.

    For X0 ~ N(0, I) and independent coupling the score is (t v - x) / (1 - t), so the extra drift
    is ``(1 - t) sigma^2 / 2 (t v - x)``, finite everywhere.

    Differs from the paper: the official code's extra drift, ``sigma^2 / (2 s^2) (t (1 - t) v - (2 -
    t) x) / 2``, does not keep the marginals (ten times too strong near data). It is used only with
    ``repo_formula=True``.
    """

    reversible = False

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Options.

        Attributes:
            sigma: strength of the noise; 0 is Euler.
            repo_formula: the official code's drift, for comparison with it only.
            noise_scale: s, standard deviation of x0 in that formula.
        """

        sigma: NonNegative = 1.0
        repo_formula: bool = False
        noise_scale: NonNegative = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.options = config

    def integrate(self, run: Run, x: Tensor, grid: TimeGrid) -> Tensor:
        options = self.options
        for (t, dt), t_next in zip(grid, grid.points[1:], strict=True):
            v = run.field(x, t)
            if options.repo_formula:
                pull = (t * (1 - t) * v - (2 - t) * x) / (4 * options.noise_scale**2)
            else:
                pull = (1 - t) / 2 * (t * v - x)
            spread = options.sigma * (1 - t) * math.sqrt(dt)
            x = x + dt * (v + options.sigma**2 * pull) + spread * run.noise(x)
            run.record(x, t_next)
        return x
