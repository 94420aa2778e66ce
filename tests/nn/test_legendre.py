"""Legendre memory: its system, its forms, its limits."""

from __future__ import annotations

import copy

import pytest
import torch

from effformer.nn.legendre import LegendreMemory, legendre_system
from effformer.profile import Counter

SIZES = [(1, 5.0), (8, 20.0), (12, 40.0), (24, 128.0), (7, 3.5), (16, 300.0)]


def reference(u: torch.Tensor, order: int, theta: float) -> torch.Tensor:
    """The recurrence in float64, its matrices from one exponential of [[A, b], [0, 0]]."""
    block = torch.zeros(order + 1, order + 1, dtype=torch.float64)
    for i in range(order):
        for j in range(order):
            block[i, j] = (2 * i + 1) / theta * (-1 if i < j else (-1) ** (i - j + 1))
        block[i, order] = (2 * i + 1) / theta * (-1) ** i
    exact = torch.linalg.matrix_exp(block)
    m, rows = torch.zeros(u.shape[0], order, dtype=torch.float64), []
    for sample in u.double().unbind(1):
        m = m @ exact[:order, :order].T + sample[:, None] * exact[:order, order]
        rows.append(m)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("n", [1, 2, 13, 400])
@pytest.mark.parametrize(("order", "theta"), SIZES)
def test_all_forms_equal_the_recurrence(order: int, theta: float, n: int) -> None:
    memory = LegendreMemory(order, theta).double()
    u = torch.randn(2, n, dtype=torch.float64)
    expected = reference(u, order, theta)
    forms = [memory, memory.convolve, memory.multiply, memory.transform]
    forms += [lambda u: memory.step(u, memory.init_state(2))[0]]
    for form in forms:
        torch.testing.assert_close(form(u), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("form", ["convolve", "multiply", "transform"])
def test_gradients_equal_those_of_the_recurrence(form: str) -> None:
    memory = LegendreMemory(6, 9.0).double()
    u = torch.randn(2, 70, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 70, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad((reference(u, 6, 9.0) * weight).sum(), u)
    (grad,) = torch.autograd.grad((getattr(memory, form)(u) * weight).sum(), u)
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("order", "theta"), [(256, 128.0), (468, 784.0), (512, 512.0)])
def test_high_orders_hold_in_single_precision(order: int, theta: float) -> None:
    memory, exact = LegendreMemory(order, theta), LegendreMemory(order, theta).double()
    torch.testing.assert_close(memory.response.double(), exact.response, rtol=0, atol=1e-7)
    assert torch.linalg.eigvals(exact.transition).abs().max() < 1
    u = torch.rand(1, 300)
    expected = exact.step(u.double(), exact.init_state(1))[0]
    torch.testing.assert_close(memory(u).double(), expected, rtol=0, atol=2e-5)
    stepped = memory.step(u, memory.init_state(1))[0]
    torch.testing.assert_close(stepped.double(), expected, rtol=0, atol=2e-5)


def test_a_forgotten_sample_is_below_rounding() -> None:
    for order, theta in SIZES:
        memory = LegendreMemory(order, theta).double()
        u = torch.zeros(1, memory.reach + 5, dtype=torch.float64)
        u[0, 0] = 1
        m = memory.step(u, memory.init_state(1))[0][0]
        peak = m.abs().max()
        assert m[memory.reach :].abs().max() <= 1e-10 * peak
        assert m[memory.reach - 1].abs().max() > 1e-10 * peak


def test_a_constant_is_its_zeroth_coefficient() -> None:
    memory = LegendreMemory(12, 30.0).double()
    m = memory(torch.full((1, 200), 0.7, dtype=torch.float64))[0, -1]
    expected = torch.zeros(12, dtype=torch.float64)
    expected[0] = 0.7
    torch.testing.assert_close(m, expected, rtol=0, atol=1e-9)


def test_the_coefficients_give_the_past_back() -> None:
    """Shifted Legendre polynomials at age r in [0, 1] of the window: sum_i m_i P_i(2 r - 1)."""
    theta, order = 100.0, 12
    memory = LegendreMemory(order, theta).double()
    time = torch.arange(400, dtype=torch.float64)
    u = torch.sin(time / 17)[None]
    m = memory(u)[0, -1]
    for age in (10.0, 50.0, 90.0):
        x, values = 2 * age / theta - 1, [1.0, 2 * age / theta - 1]
        for i in range(1, order - 1):
            values.append(((2 * i + 1) * x * values[i] - i * values[i - 1]) / (i + 1))
        told = sum(float(c) * v for c, v in zip(m, values, strict=True))
        assert told == pytest.approx(torch.sin((time[-1] - age) / 17).item(), abs=0.05)


@pytest.mark.parametrize(
    ("n", "order", "theta"), [(100, 8, 20.0), (300, 8, 200.0), (2000, 4, 99.0)]
)
def test_macs(n: int, order: int, theta: float) -> None:
    memory = LegendreMemory(order, theta)

    def traced(batch: int) -> int:
        with Counter(memory) as counter:
            memory(torch.randn(batch, n))
        return sum(tally.macs for tally in counter.rows.values())

    assert traced(3) - traced(2) == memory.macs(n)


def test_long_signals_cost_in_proportion() -> None:
    memory = LegendreMemory(8, 500.0)
    assert memory.reach > 256
    assert memory.macs(1 << 18) <= 2.02 * memory.macs(1 << 17)


def test_casts_compute_the_matrices_again() -> None:
    memory = LegendreMemory(24, 128.0)
    exact, _ = legendre_system(24, 128.0)
    assert torch.equal(memory.float().double().transition, exact)
    assert memory.half().transition.dtype is torch.float32
    assert memory.to(torch.bfloat16)(torch.rand(1, 9).bfloat16()).dtype is torch.bfloat16
    assert torch.equal(copy.deepcopy(memory).double().transition, exact)
    assert not memory.state_dict()
    with torch.device("meta"):
        empty = LegendreMemory(24, 128.0)
    assert empty.response.is_meta
    assert torch.equal(empty.to_empty(device="cpu").double().transition, exact)


def test_bad_sizes() -> None:
    for order, theta in [(0, 5.0), (4, 0.5), (4, float("inf"))]:
        with pytest.raises(ValueError, match="order and theta must be at least 1, got"):
            LegendreMemory(order, theta)
