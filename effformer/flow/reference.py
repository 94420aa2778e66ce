"""The slow obvious version of everything in this package: loops over samples and steps, float64.

Nothing here is fast and nothing is clever; the tests compare the fast paths with it, forward and
backward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "coefficients", "convert", "ddpm_posterior", "dpm_solver_2m", "euler", "euler_maruyama", "flow_matching_loss",
    "guide", "heun", "midpoint", "pseudo_huber_loss", "rk4", "straightness", "unipc",
]  # fmt: skip

Field = Callable[[Tensor, float], Tensor]


def coefficients(path: str, t: float) -> tuple[float, float, float, float]:
    """(alpha, alpha', sigma, sigma') of "linear", "gvp" or "vp" at one time, from the formulas."""
    if path == "linear":
        return t, 1.0, 1 - t, -1.0
    if path == "gvp":
        angle, half = math.pi * t / 2, math.pi / 2
        return math.sin(angle), half * math.cos(angle), math.cos(angle), -half * math.sin(angle)
    exponent = -((1 - t) ** 2) * (20 - 0.1) / 4 - (1 - t) * 0.1 / 2
    slope = (1 - t) * (20 - 0.1) / 2 + 0.1 / 2
    alpha, sigma = math.exp(exponent), math.sqrt(1 - math.exp(2 * exponent))
    return alpha, alpha * slope, sigma, -math.exp(2 * exponent) * slope / sigma


def convert(path: str, value: Tensor, x: Tensor, t: Tensor, source: str, target: str) -> Tensor:
    """Solve the two equations that x_t and the prediction give for (data, noise), per sample."""
    out = []
    for value_i, x_i, t_i in zip(value.double(), x.double(), t.tolist(), strict=True):
        alpha, dalpha, sigma, dsigma = coefficients(path, t_i)
        rows = {
            "velocity": (dalpha, dsigma),
            "data": (1.0, 0.0),
            "noise": (0.0, 1.0),
            "score": (0.0, -1 / sigma),
        }
        system = torch.tensor([[alpha, sigma], rows[source]], dtype=torch.float64)
        right = torch.stack([x_i.flatten(), value_i.flatten()])
        data, noise = torch.linalg.solve(system, right)
        out.append((rows[target][0] * data + rows[target][1] * noise).view_as(x_i))
    return torch.stack(out)


def euler(field: Field, x: Tensor, points: Sequence[float]) -> Tensor:
    """Follow the derivative at the start of each step."""
    for t, t_next in itertools.pairwise(points):
        x = x + (t_next - t) * field(x, t)
    return x


def midpoint(field: Field, x: Tensor, points: Sequence[float]) -> Tensor:
    """Half an Euler step to find the derivative of the whole step."""
    for t, t_next in itertools.pairwise(points):
        h = t_next - t
        x = x + h * field(x + h / 2 * field(x, t), t + h / 2)
    return x


def heun(field: Field, x: Tensor, points: Sequence[float]) -> Tensor:
    """The mean of the derivatives at both ends of an Euler step."""
    for t, t_next in itertools.pairwise(points):
        h = t_next - t
        k1 = field(x, t)
        k2 = field(x + h * k1, t_next)
        x = x + h * (k1 + k2) / 2
    return x


def rk4(field: Field, x: Tensor, points: Sequence[float]) -> Tensor:
    """The classical method of order 4."""
    for t, t_next in itertools.pairwise(points):
        h = t_next - t
        k1 = field(x, t)
        k2 = field(x + h / 2 * k1, t + h / 2)
        k3 = field(x + h / 2 * k2, t + h / 2)
        k4 = field(x + h * k3, t_next)
        x = x + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6
    return x


def dpm_solver_2m(field: Field, x: Tensor, points: Sequence[float]) -> Tensor:
    """Straight lines from the noise to a datum that is extrapolated in l = -ln(1 - t)."""
    before, l_before = None, 0.0
    for t, t_next in itertools.pairwise(points):
        data = x + (1 - t) * field(x, t)
        if t_next == 1:
            return data
        l_now, l_next = -math.log(1 - t), -math.log(1 - t_next)
        aimed = data
        if before is not None:
            r = (l_now - l_before) / (l_next - l_now)
            aimed = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * before
        x = (1 - t_next) / (1 - t) * x - math.expm1(-(l_next - l_now)) * aimed
        before, l_before = data, l_now
    return x


def unipc(field: Field, x: Tensor, points: Sequence[float]) -> Tensor:
    """Order 2 as in the paper: weights that make the exponential integral exact for polynomials in
    l = ln(t / (1 - t)) through the data that are known, half the difference where there is one alone.
    """
    places = [math.log(t / (1 - t)) if 0 < t < 1 else (2 * t - 1) * 1e12 for t in points]
    data: list[Tensor] = []

    def moved(start: Tensor, a: int, order: int) -> Tensor:
        """From place a to the next, with the data there if they are known."""
        others = [k for k in (a - 1, a + 1) if a - order < k < a or a < k < len(data)]
        h = places[a + 1] - places[a]
        ratios = [(places[k] - places[a]) / h for k in others]
        gaps = [(data[k] - data[a]) / r for k, r in zip(others, ratios, strict=True)]
        phi = [math.expm1(-h)]
        for k in (1, 2):
            phi.append(phi[-1] / -h - 1 / math.factorial(k))
        weights = [0.5] * len(gaps)
        if len(gaps) == 2:
            wanted = [math.factorial(k + 1) * phi[k + 1] / phi[0] for k in (0, 1)]
            powers = torch.tensor([[1.0, 1.0], ratios], dtype=torch.float64)
            weights = torch.linalg.solve(powers, torch.tensor(wanted, dtype=torch.float64)).tolist()
        total = sum((w * g for w, g in zip(weights, gaps, strict=True)), data[a])
        left = (1 - points[a + 1]) / (1 - points[a])
        return left * start - points[a + 1] * phi[0] * total

    start, order = x, 0
    for i in range(len(points) - 1):
        data.append(x + (1 - points[i]) * field(x, points[i]))
        if order:
            x = moved(start, i - 1, order)
        start, order = x, min(2, i + 1, len(points) - 1 - i)
        x = moved(x, i, order)
    return x


def euler_maruyama(
    field: Field,
    x: Tensor,
    points: Sequence[float],
    noise: Sequence[Tensor],
    diffusion: Callable[[float], float],
) -> Tensor:
    """X + (v + w s) h + sqrt(2 w h) z on the linear path, with score s = (t v - x) / (1 - t)."""
    for t, t_next, z in zip(points, points[1:], noise, strict=False):
        h, w, v = t_next - t, diffusion(t), field(x, t)
        x = x + (v + w * (t * v - x) / (1 - t)) * h + math.sqrt(2 * w * h) * z
    return x


def flow_matching_loss(
    network: Callable[[Tensor, Tensor], Tensor], data: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Per sample (B,): the mean over elements of (v(x_t, t) - (x1 - x0))^2."""
    losses = []
    for x1, x0, t_i in zip(data, noise, t, strict=True):
        x_t = t_i * x1 + (1 - t_i) * x0
        v = network(x_t[None], t_i[None])[0]
        losses.append(((v - (x1 - x0)) ** 2).mean())
    return torch.stack(losses)


def pseudo_huber_loss(v: Tensor, target: Tensor, factor: float) -> Tensor:
    """Per sample (B,): (sqrt(|v - u|^2 + c^2) - c) / d with c = factor d."""
    losses = []
    for v_i, target_i in zip(v, target, strict=True):
        d = v_i.numel()
        c = factor * d
        losses.append((torch.sqrt(((v_i - target_i) ** 2).sum() + c**2) - c) / d)
    return torch.stack(losses)


def guide(v_cond: Tensor, v_null: Tensor, scale: float, channels: int) -> Tensor:
    """Guide the leading channels, one at a time; the rest stays conditional."""
    planes = []
    for c in range(v_cond.shape[1]):
        cond, null = v_cond[:, c], v_null[:, c]
        planes.append(null + scale * (cond - null) if c < channels else cond)
    return torch.stack(planes, dim=1)


def straightness(trajectory: Tensor) -> Tensor:
    """Per sample (B,): mean over equal steps of the squared norm of chord minus velocity."""
    steps = trajectory.shape[0] - 1
    out = []
    for states in trajectory.double().unbind(1):
        total = 0.0
        for i in range(steps):
            velocity = (states[i + 1] - states[i]) * steps
            total += float(((states[-1] - states[0] - velocity) ** 2).sum())
        out.append(total / steps)
    return torch.tensor(out, dtype=torch.float64)


def ddpm_posterior(
    betas: Sequence[float], step: int, x0: float, x: float
) -> tuple[float, float, float]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) by Bayes' rule, and abar_t.

    The prior of x_{t-1} given x_0 is N(sqrt(abar') x_0, 1 - abar'), the likelihood of x_t is
    N(sqrt(1 - beta) x_{t-1}, beta).
    """
    before = math.prod(1 - b for b in betas[:step])
    beta = betas[step]
    if step == 0:
        return x0, 0.0, 1 - beta
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (math.sqrt(before) * x0 / (1 - before) + math.sqrt(1 - beta) * x / beta) / precision
    return mean, 1 / precision, before * (1 - beta)
