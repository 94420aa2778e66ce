"""Explicit Runge-Kutta steps, and adaptive integration with Dormand and Prince's pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "DORMAND_PRINCE", "EULER", "HEUN", "HEUN3", "MIDPOINT", "RK4_38", "RK4_CLASSIC", "Tableau",
    "adaptive_steps", "runge_kutta_step",
]  # fmt: skip

Field = Callable[[Tensor, float], Tensor]
"""f(x, t): the derivative of x (B, ...) at the time t."""


@dataclass(frozen=True, slots=True)
class Tableau:
    """Butcher tableau of an explicit method.

    ``k_i = f(x + dt sum_j a_ij k_j, t + c_i dt)``, then ``x += dt sum_i b_i k_i``.

    Attributes:
        order: order of convergence.
        a: rows of the stages after the first.
        b: weights of the result.
        c: times of the stages after the first, in units of the step.
        error: weights of the error estimate over the stages and the derivative at the new point
            (empty: none).
    """

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] = ()


EULER = Tableau(1, (), (1.0,), ())
MIDPOINT = Tableau(2, ((1 / 2,),), (0.0, 1.0), (1 / 2,))
HEUN = Tableau(2, ((1.0,),), (1 / 2, 1 / 2), (1.0,))
HEUN3 = Tableau(3, ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), (1 / 3, 2 / 3))
RK4_CLASSIC = Tableau(
    4, ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (1 / 2, 1 / 2, 1.0)
)
RK4_38 = Tableau(
    4,
    ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    (1 / 3, 2 / 3, 1.0),
)
DORMAND_PRINCE = Tableau(
    5,
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40),
)


def runge_kutta_step(
    field: Field, x: Tensor, t: float, dt: float, tableau: Tableau, first: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """One explicit Runge-Kutta step.

    Args:
        field: the derivative f(x, t).
        x: the state (B, ...) at t.
        t: time.
        dt: width of the step, negative to go backwards.
        tableau: the method.
        first: f(x, t) if it is known already.

    Returns:
        The state at t + dt and the derivatives of the stages.
    """
    stages = [field(x, t) if first is None else first]
    for row, c in zip(tableau.a, tableau.c, strict=True):
        stages.append(field(_combine(x, stages, row, dt), t + c * dt))
    return _combine(x, stages, tableau.b, dt), stages


def _combine(x: Tensor, stages: list[Tensor], weights: tuple[float, ...], dt: float) -> Tensor:
    for k, weight in zip(stages, weights, strict=True):
        if weight != 0.0:
            x = torch.add(x, k, alpha=weight * dt)
    return x


def adaptive_steps(
    field: Field,
    x: Tensor,
    start: float,
    end: float,
    *,
    rtol: float,
    atol: float,
    max_steps: int,
    on_step: Callable[[Tensor, float], None],
) -> Tensor:
    """Integrate with Dormand and Prince's pair of orders 5 and 4, in steps that suit the error.

    The whole batch is one system, as in SciPy's ``solve_ivp(method="RK45")``, whose initial step
    and step control these are: the error norm is the root mean square of ``error / (atol + rtol
    |x|)`` over all elements, so the steps depend on what else is in the batch.

    Args:
        field: the derivative f(x, t).
        x: the state at ``start``.
        start: first time.
        end: last time; smaller than ``start`` to go backwards.
        rtol: relative tolerance.
        atol: absolute tolerance.
        max_steps: attempted steps after which to give up.
        on_step: called with the state and time after every accepted step.

    Returns:
        The state at ``end``.

    Raises:
        ValueError: the tolerances cannot be met, or not within ``max_steps``.
    """
    if start == end:
        return x
    direction = math.copysign(1.0, end - start)
    t, derivative = start, field(x, start)
    width = _initial_width(field, x, derivative, start, end, rtol, atol)
    rejected = False
    for _ in range(max_steps):
        smallest = 10 * abs(math.nextafter(t, direction * math.inf) - t)
        if not width >= smallest:
            raise ValueError(f"dopri5: no step meets rtol={rtol}, atol={atol} at t={t:.6g}")
        t_next = t + direction * width
        t_next = end if direction * (t_next - end) > 0 else t_next
        dt = t_next - t
        candidate, stages = runge_kutta_step(field, x, t, dt, DORMAND_PRINCE, derivative)
        stages.append(field(candidate, t_next))
        error = _combine(torch.zeros_like(x), stages, DORMAND_PRINCE.error, dt)
        norm = _rms(error / (atol + rtol * torch.maximum(x.abs(), candidate.abs())))
        if norm >= 1 or math.isnan(norm):
            width, rejected = abs(dt) * max(0.2, 0.9 * norm**-0.2), True
            continue
        growth = 10.0 if norm == 0 else min(10.0, 0.9 * norm**-0.2)
        width, rejected = abs(dt) * (min(1.0, growth) if rejected else growth), False
        t, x, derivative = t_next, candidate, stages[-1]
        on_step(x, t)
        if t == end:
            return x
    raise ValueError(f"dopri5: t={t:.6g} of {end:.6g} reached after max_steps={max_steps}")


def _initial_width(
    field: Field, x: Tensor, derivative: Tensor, start: float, end: float, rtol: float, atol: float
) -> float:
    """First width, after Hairer et al., Solving Ordinary Differential Equations I, section II.4."""
    span, direction = abs(end - start), math.copysign(1.0, end - start)
    scale = atol + rtol * x.abs()
    d0, d1 = _rms(x / scale), _rms(derivative / scale)
    h0 = min(1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1, span)
    probe = field(torch.add(x, derivative, alpha=h0 * direction), start + h0 * direction)
    d2 = _rms((probe - derivative) / scale) / h0
    largest = max(d1, d2)
    h1 = max(1e-6, h0 * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** 0.2
    return min(100 * h0, h1, span)


def _rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())
