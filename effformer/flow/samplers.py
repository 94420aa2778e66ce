"""Sampling: carry noise along a velocity field to data, or back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from effformer.arguments import checked
from effformer.notebook import Shown, picture_grid, tables
from effformer.values import Count, Positive

from .. import config as _config
from ..checks import check_shape, check_values
from ..config import Spec, resolve
from ..registry import sampler as registry
from .conventions import Remembering, VelocityField, answered, as_velocity, batch_times
from .guidance import Guidance, Guided
from .paths import Point
from .solvers import (
    EULER,
    HEUN,
    HEUN3,
    MIDPOINT,
    RK4_38,
    RK4_CLASSIC,
    Tableau,
    adaptive_steps,
    runge_kutta_step,
)
from .times import Steps, TimeGrid

__all__ = [
    "RK4", "RK438", "Dopri5", "Euler", "Heun", "Heun3", "Midpoint", "Run", "RungeKutta",
    "SampleResult", "Sampler", "sample",
]  # fmt: skip

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class SampleResult(Shown):
    """What `sample` returns.

    Attributes:
        x: the samples, shape and dtype of x0.
        trajectory: (S + 1, B, ...) the start and the state after every step, or None if it was not
            asked for.
        times: (S + 1) times of these states.
        nfe: number of evaluations of the velocity field (a guided evaluation counts once).
    """

    x: Tensor
    trajectory: Tensor | None
    times: tuple[float, ...]
    nfe: int

    def _facts(self) -> dict[str, Any]:
        steps = len(self.times) - 1
        return {"shape": tuple(self.x.shape), "steps": steps, "evaluations": self.nfe}

    def _body(self) -> str:
        return picture_grid(self.x, (-1.0, 1.0), "samples") + "".join(tables(self._facts()))


class Run:
    """One integration: evaluates the field, draws noise, keeps the books.

    Attributes:
        nfe: evaluations so far.
        step: steps so far.
        total: steps in all, None if the sampler chooses them.
        times: times of the start and of the state after every step.
        states: these states, if they are kept.
    """

    def __init__(
        self,
        velocity: VelocityField,
        cond: Mapping[str, Any],
        x0: Tensor,
        total: int | None,
        generator: torch.Generator | None,
        noise: Tensor | Sequence[Tensor] | None,
        keep: bool,
        progress: Progress | None,
    ) -> None:
        self.nfe = 0
        self.step = 0
        self.total = total
        self.times: list[float] = []
        self.states: list[Tensor] = []
        self._velocity, self._cond, self._like = velocity, cond, x0
        self._generator, self._noise, self._keep, self._progress = generator, noise, keep, progress

    def field(self, x: Tensor, t: float) -> Tensor:
        """v(x, t) in the dtype of the state.

        Raises:
            ValueError: the velocity has another shape than x, or is not finite.
        """
        self.nfe += 1
        x_in = x.to(self._like.dtype)
        v = self._velocity(x_in, batch_times(t, x_in), **self._cond)
        v = answered(v, x, where="sample")
        if not bool(torch.isfinite(v).all()):
            of = "" if self.total is None else f" of {self.total}"
            raise ValueError(
                f"sample: the velocity is not finite at step {self.step + 1}{of}, t={t:.6g}"
            )
        return v.to(x.dtype)

    def noise(self, x: Tensor) -> Tensor:
        """Standard normal noise of the present step: injected, or drawn from the generator."""
        if self._noise is not None:
            if self.step >= len(self._noise):
                raise ValueError(f"sample: noise for {len(self._noise)} steps is not enough")
            check_shape(self._noise[self.step], f"{tuple(x.shape)}", x.shape, where="sample: noise")
            check_values(self._noise[self.step], where="sample: noise")
            return self._noise[self.step].to(x)
        device = x.device if self._generator is None else self._generator.device
        drawn = torch.randn(x.shape, generator=self._generator, device=device, dtype=x.dtype)
        return drawn.to(x.device)

    def record(self, x: Tensor, t: float) -> None:
        """Close a step that ended in state x at time t."""
        self.step += 1
        self.start(x, t)
        if self._progress is not None:
            self._progress(self.step, self.total)

    def start(self, x: Tensor, t: float) -> None:
        """Note a state without closing a step."""
        self.times.append(t)
        if self._keep:
            self.states.append(x.to(self._like.dtype))


class Sampler:
    """Base of all samplers. Each has a ``Config`` of its own, by which a config finds its sampler.

    Attributes:
        reversible: runs from data to noise as well.
        config: the options.
    """

    reversible: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        self.config = config

    def grid(self, steps: int) -> TimeGrid:
        """The times of a run of ``steps`` steps if no grid is given."""
        return TimeGrid.uniform(steps)

    def state_dtype(self, x: Tensor) -> torch.dtype:
        """Precision of the state between evaluations: at least float32."""
        return torch.promote_types(x.dtype, torch.float32)

    def evaluations(self, steps: int) -> int | None:
        """Evaluations of the velocity in a run of ``steps`` steps, None if the run decides."""
        return None

    @abstractmethod
    def integrate(self, run: Run, x: Tensor, grid: TimeGrid) -> Tensor:
        """Carry the state x (B, ...) along the grid."""


class RungeKutta(Sampler):
    """Base of the fixed-step explicit Runge-Kutta methods."""

    tableau: ClassVar[Tableau]

    def evaluations(self, steps: int) -> int:
        return steps * len(self.tableau.b)

    def integrate(self, run: Run, x: Tensor, grid: TimeGrid) -> Tensor:
        for (t, dt), t_next in zip(grid, grid.points[1:], strict=True):
            x, _ = runge_kutta_step(run.field, x, t, dt, self.tableau)
            run.record(x, t_next)
        return x


@registry.register("euler")
class Euler(RungeKutta):
    """Euler: one evaluation per step, order 1."""

    tableau = EULER

    class Config(_config.Config):
        """No options."""


@registry.register("midpoint")
class Midpoint(RungeKutta):
    """Midpoint: two evaluations per step, order 2."""

    tableau = MIDPOINT

    class Config(_config.Config):
        """No options."""


@registry.register("heun", aliases=("heun2",))
class Heun(RungeKutta):
    """Heun's trapezoidal method: two evaluations per step, order 2."""

    tableau = HEUN

    class Config(_config.Config):
        """No options."""


@registry.register("heun3")
class Heun3(RungeKutta):
    """Heun's third-order method: three evaluations per step."""

    tableau = HEUN3

    class Config(_config.Config):
        """No options."""


@registry.register("rk4")
class RK4(RungeKutta):
    """The classical Runge-Kutta method: four evaluations per step, order 4."""

    tableau = RK4_CLASSIC

    class Config(_config.Config):
        """No options."""


@registry.register("rk4-38")
class RK438(RungeKutta):
    """Kutta's 3/8 rule (what torchdiffeq calls rk4): four evaluations per step, order 4."""

    tableau = RK4_38

    class Config(_config.Config):
        """No options."""


@registry.register("dopri5", aliases=("rk45",))
class Dopri5(Sampler):
    """Dormand and Prince's adaptive method of order 5: the tolerances choose the steps.

    The grid gives the first and the last time only. The whole batch is one system with one step
    width, and the state is kept in float64, as in SciPy's RK45.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(_config.Config):
        """Tolerances.

        Attributes:
            rtol: relative tolerance.
            atol: absolute tolerance.
            max_steps: attempted steps after which to give up.
        """

        rtol: Positive = 1e-5
        atol: Positive = 1e-5
        max_steps: Count = 1000

    def state_dtype(self, x: Tensor) -> torch.dtype:
        return torch.float64

    def integrate(self, run: Run, x: Tensor, grid: TimeGrid) -> Tensor:
        options: Dopri5.Config = self.config
        run.total = None
        return adaptive_steps(
            run.field, x, grid.start, grid.end, rtol=options.rtol, atol=options.atol,
            max_steps=options.max_steps, on_step=run.record,
        )  # fmt: skip


@checked
def sample(
    velocity: VelocityField,
    x0: Point,
    *,
    sampler: Spec = "euler",
    steps: Steps = 10,
    grid: TimeGrid | None = None,
    reverse: bool = False,
    guidance: Guidance | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | Sequence[Tensor] | None = None,
    trajectory: bool = False,
    progress: Progress | None = None,
    grad: bool = False,
    **cond: Any,
) -> SampleResult:
    """Solve dx = v(x, t, **cond) dt from noise (t = 0) to data (t = 1).

    Args:
        velocity: our velocity field, or a model that says what it was trained to predict
            (``model.trained``); see `adapt` for other networks.
        x0: the start (B, ...), floating point; noise, or data with ``reverse``.
        sampler: name, dict or config: euler, midpoint, heun, rk4, dopri5, sde-euler, ...
        steps: number of equal steps; ignored by adaptive samplers and if ``grid`` is given.
        grid: the times, instead of ``steps``.
        reverse: integrate backwards, data to noise.
        guidance: classifier-free guidance.
        generator: randomness of stochastic samplers; None is torch's default generator.
        noise: standard normal noise of each step (N, B, ...) instead of drawing it.
        trajectory: keep the state after every step.
        progress: called with (steps done, steps in all or None) after every step.
        grad: keep the graph for backpropagation through the sampler.
        cond: conditions, named tensors that are handed to the velocity (labels are ``y``).

    Returns:
        The samples, and the trajectory if asked for.

    Raises:
        TypeError: x0 is not a floating-point tensor, or an argument has the wrong type.
        ValueError: unknown sampler or option, steps < 1, a velocity of the wrong shape, a velocity
            that is not finite.

    Example:
        >>> import torch
        >>> from effformer.flow import sample
        >>> result = sample(lambda x, t: -x, torch.ones(1, 1), sampler="rk4", steps=8)
        >>> round(result.x.item(), 4), result.nfe
        (0.3679, 32)
    """
    check_values(x0, where="sample: x0")
    solver = _solver(sampler, reverse)
    times = solver.grid(steps) if grid is None else grid
    times = times.reversed() if reverse else times
    velocity = as_velocity(velocity, where="sample")
    field = velocity if guidance is None else Guided(velocity, guidance)
    if isinstance(field, Remembering):
        field.restart(solver.evaluations(len(times)), x0.shape[0])
    run = Run(field, cond, x0, len(times), generator, noise, trajectory, progress)
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        x = x0.to(solver.state_dtype(x0))
        run.start(x, times.start)
        x = solver.integrate(run, x, times).to(x0.dtype)
    states = torch.stack(run.states) if trajectory else None
    return SampleResult(x, states, tuple(run.times), run.nfe)


def _solver(sampler: Spec, reverse: bool) -> Sampler:
    config = resolve("sampler", sampler, where="sample")
    solver: Sampler = config.build()
    if reverse and not solver.reversible:
        raise ValueError(
            f"sample: {config.entry.name} runs from noise to data only; "
            "euler, midpoint, heun, rk4 and dopri5 can reverse"
        )
    return solver
