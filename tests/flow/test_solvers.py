from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effformer.flow import solvers
from effformer.flow.solvers import Tableau

FIXED = {
    name: getattr(solvers, name)
    for name in ("EULER", "MIDPOINT", "HEUN", "HEUN3", "RK4_CLASSIC", "RK4_38", "DORMAND_PRINCE")
}


@pytest.mark.parametrize("name", FIXED)
def test_tableaux_are_consistent(name: str) -> None:
    tableau: Tableau = FIXED[name]
    assert sum(tableau.b) == pytest.approx(1)
    for row, c in zip(tableau.a, tableau.c, strict=True):
        assert sum(row) == pytest.approx(c)
    assert sum(tableau.error) == pytest.approx(0, abs=1e-12)


def _error(tableau: Tableau, steps: int) -> float:
    """dx/dt = sin 3x + x cos 2t, x(0) = 1 on [0, 1], against a very fine solution."""

    def field(x: Tensor, t: float) -> Tensor:
        return torch.sin(3 * x) + x * math.cos(2 * t)

    def solve(method: Tableau, n: int) -> float:
        x = torch.ones(1, dtype=torch.float64)
        for i in range(n):
            x, _ = solvers.runge_kutta_step(field, x, i / n, 1 / n, method)
        return float(x)

    return abs(solve(tableau, steps) - solve(solvers.DORMAND_PRINCE, 400))


@pytest.mark.parametrize("name", FIXED)
def test_order_of_convergence(name: str) -> None:
    tableau: Tableau = FIXED[name]
    coarse, fine = _error(tableau, 24), _error(tableau, 48)
    assert tableau.order - 0.2 < math.log2(coarse / fine) < tableau.order + 0.8


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (1e-3, 1.0)])
def test_adaptive_equals_scipy(start: float, end: float) -> None:
    integrate = pytest.importorskip("scipy.integrate", reason="needs the extra 'ode'")
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    calls = 0

    def field(x: Tensor, t: float) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(x @ matrix) * (1 + 5 * t) + math.sin(9 * t)

    x0 = torch.linspace(-1, 1, 6, dtype=torch.float64)
    times: list[float] = []
    ours = solvers.adaptive_steps(
        field, x0, start, end, rtol=1e-5, atol=1e-6, max_steps=1000,
        on_step=lambda _, t: times.append(t),
    )  # fmt: skip
    ours_calls = calls
    theirs = integrate.solve_ivp(
        lambda t, x: field(torch.from_numpy(x), float(t)).numpy(),
        (start, end), x0.numpy(), method="RK45", rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    assert ours_calls == theirs.nfev
    assert times == pytest.approx(theirs.t[1:].tolist(), rel=1e-9)
    torch.testing.assert_close(ours, torch.from_numpy(theirs.y[:, -1]), rtol=1e-9, atol=1e-9)


def test_adaptive_gives_up_with_a_reason() -> None:
    x = torch.ones(1, dtype=torch.float64)

    def explode(x: Tensor, t: float) -> Tensor:
        return x * x * 2  # infinite at t = 1/2

    with pytest.raises(ValueError, match=r"t=0\.(49|5).*max_steps=300|no step meets"):
        solvers.adaptive_steps(
            explode, x, 0.0, 1.0, rtol=1e-6, atol=1e-6, max_steps=300, on_step=lambda x, t: None
        )
    same = solvers.adaptive_steps(
        explode, x, 0.3, 0.3, rtol=1e-6, atol=1e-6, max_steps=3, on_step=lambda x, t: None
    )
    assert same is x
