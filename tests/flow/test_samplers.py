from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effformer import registry
from effformer.flow import Guidance, TimeGrid, adapt, reference, sample
from effformer.flow.samplers import Dopri5, Euler

ODE = ["euler", "midpoint", "heun", "heun3", "rk4", "rk4-38", "dopri5"]


def swirl(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([-x[:, 1], x[:, 0]], 1) * (1 + t[:, None])


def gaussian(mean: float, std: float) -> Any:
    """Velocity of rectified flow from N(0, 1) to N(mean, std^2), independent coupling."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        gap = (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2)
        return mean + gap * (x - t * mean)

    return velocity


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "rk4", "dpm++2m", "unipc"])
def test_equals_the_reference_forward_and_backward(name: str) -> None:
    layer = torch.nn.Linear(3, 3).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(layer(x)) * (1 + t[:, None])

    x0 = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    grid = TimeGrid.uniform(5)
    ours = sample(velocity, x0, sampler=name, grid=grid, grad=True).x
    slow = getattr(reference, {"dpm++2m": "dpm_solver_2m"}.get(name, name))(
        lambda x, t: velocity(x, torch.full((4,), t, dtype=torch.float64)), x0, grid.points
    )
    torch.testing.assert_close(ours, slow)
    inputs = [x0, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(slow.square().sum(), inputs),
    )


@pytest.mark.parametrize("name", ODE)
def test_gaussian_map(name: str) -> None:
    """z1 = mean + std z0 in closed form; steps by step halving show the order."""
    z0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = 1.5 + 0.5 * z0

    def error(steps: int) -> float:
        options = {"name": name, "rtol": 1e-8, "atol": 1e-8} if name == "dopri5" else name
        out = sample(gaussian(1.5, 0.5), z0, sampler=options, steps=steps)
        return float((out.x - exact).abs().max())

    if name == "dopri5":
        assert error(1) < 1e-6
        return
    order = registry.sampler.get(name).build.tableau.order
    assert math.log2(error(64) / error(128)) > order - 0.25  # midpoint: 3 on this field


@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_two_data_make_a_second_order(name: str) -> None:
    """In front of the data, where a last step would take one of them alone."""
    z0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = 0.9 * 1.5 + math.sqrt(0.1**2 + (0.9 * 0.5) ** 2) * z0

    def error(steps: int) -> float:
        grid = TimeGrid.uniform(steps, 0.0, 0.9)
        out = sample(gaussian(1.5, 0.5), z0, sampler=name, grid=grid)
        assert out.nfe == steps
        return float((out.x - exact).abs().max())

    assert math.log2(error(64) / error(128)) > 1.75
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        sample(swirl, z0, sampler=name, grid=TimeGrid.rectified_flow(3))
    with pytest.raises(ValueError, match="from noise to data only"):
        sample(swirl, z0, sampler=name, reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_unipc_is_that_of_diffusers(steps: int) -> None:
    """At the times of Wan: 0.999 of the noise at first, shifted."""
    diffusers = pytest.importorskip("diffusers")
    grid = TimeGrid.uniform(steps, 0.001).shifted(5.0)
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    theirs.set_timesteps(steps)
    theirs.sigmas = torch.tensor([1 - t for t in grid.points], dtype=torch.float64)
    x0 = torch.randn(4, 3, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(3 * x) * (0.5 + t[:, None]) - x

    x = x0
    for label, t in zip(theirs.timesteps, grid.points, strict=False):
        x = theirs.step(-velocity(x, torch.full((4,), t).double()), label, x).prev_sample
    torch.testing.assert_close(sample(velocity, x0, sampler="unipc", grid=grid).x, x)


@pytest.mark.parametrize("name", ODE)
@given(steps=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_exact_on_straight_lines(name: str, steps: int, seed: int) -> None:
    """A constant velocity is straight: any step count is exact."""
    x0, speed = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(seed))
    out = sample(lambda x, t: speed, x0, sampler=name, steps=steps)
    torch.testing.assert_close(out.x, x0 + speed, rtol=1e-5, atol=1e-5)


def test_one_euler_step_reaches_a_single_datum() -> None:
    datum, x0 = torch.randn(2, 3)
    velocity = adapt(lambda x, t: datum.expand_as(x), "effformer", prediction="data")
    for steps in (1, 7):
        out = sample(velocity, x0[None], steps=steps)
        torch.testing.assert_close(out.x[0], datum, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ODE)
def test_backwards_undoes_forwards(name: str) -> None:
    x0 = torch.randn(5, 2, dtype=torch.float64)
    there = sample(swirl, x0, sampler=name, steps=400)
    back = sample(swirl, there.x, sampler=name, steps=400, reverse=True)
    tolerance = {"euler": 0.03, "midpoint": 1e-4, "heun": 1e-4}.get(name, 1e-4)
    torch.testing.assert_close(back.x, x0, rtol=tolerance, atol=tolerance)
    assert (back.times[0], back.times[-1]) == (1.0, 0.0)


def test_result() -> None:
    x0 = torch.randn(5, 2)
    seen: list[tuple[int, int | None]] = []
    out = sample(
        swirl, x0, sampler="heun", steps=3, trajectory=True, progress=lambda *a: seen.append(a)
    )
    assert out.trajectory is not None
    assert out.trajectory.shape == (4, 5, 2)
    torch.testing.assert_close(out.trajectory[0], x0)
    torch.testing.assert_close(out.trajectory[-1], out.x)
    assert out.times == pytest.approx((0, 1 / 3, 2 / 3, 1))
    assert out.nfe == 6
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert sample(swirl, x0).trajectory is None
    adaptive = sample(
        swirl, x0, sampler="rk45", trajectory=True, progress=lambda *a: seen.append(a)
    )
    assert adaptive.trajectory is not None
    assert len(adaptive.times) == len(adaptive.trajectory)
    assert adaptive.times[-1] == 1
    assert seen[-1] == (len(adaptive.times) - 1, None)


def test_batch_size_and_conditions_follow_x() -> None:
    def velocity(x: Tensor, t: Tensor, *, y: Tensor, note: str) -> Tensor:
        assert t.shape == x.shape[:1] == y.shape
        assert note == "kept"
        return x * y[:, None]

    for batch in (1, 2, 5):
        y = torch.arange(batch)
        out = sample(velocity, torch.ones(batch, 3), steps=1, y=y, note="kept")
        torch.testing.assert_close(out.x[:, 0], 1.0 + y)


def test_euler_follows_the_official_quirk_only_when_asked() -> None:
    told: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        told.append(float(t[0]))
        return torch.ones_like(x)

    x0 = torch.zeros(1, 1, dtype=torch.float64)
    compat = sample(velocity, x0, grid=TimeGrid.rectified_flow(4)).x
    assert told == pytest.approx([1e-3 + i / 4 * 0.999 for i in range(4)])
    assert float(compat) == pytest.approx(1.0)  # steps of 1/N from t = 1e-3: 1e-3 too far
    told.clear()
    assert float(sample(velocity, x0, steps=4).x) == pytest.approx(1.0)
    assert told == [0.0, 0.25, 0.5, 0.75]


def test_half_precision_keeps_the_state_in_float32() -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        assert t.dtype == torch.float32
        return torch.full_like(x, 1.0)

    out = sample(velocity, torch.zeros(1, 1, dtype=torch.bfloat16), steps=1000)
    assert out.x.dtype == torch.bfloat16
    assert float(out.x) == 1.0  # bfloat16 steps of 1/1000 would stall near 0.25


def test_gradients_only_when_asked() -> None:
    x0 = torch.randn(2, 2, requires_grad=True)
    assert not sample(swirl, x0).x.requires_grad
    assert sample(swirl, x0, grad=True).x.requires_grad


def test_guidance_is_applied() -> None:
    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return y[:, None].expand_as(x).float()

    y = torch.tensor([1, 2])
    out = sample(velocity, torch.zeros(2, 3), guidance=Guidance(2.0, {"y": 10}), y=y)
    torch.testing.assert_close(out.x[:, 0], torch.tensor([-8.0, -6.0]))
    assert out.nfe == 10


def test_configs_of_every_sampler_find_it_and_survive_json() -> None:
    assert {"euler", "midpoint", "heun", "rk4", "dopri5", "sde-euler"} <= set(
        registry.sampler.names()
    )
    for entry in registry.sampler:
        assert entry.config is not None
        config = entry.config()
        assert config.entry is entry
        assert entry.config.from_dict(config.to_dict()) == config
        sample(swirl, torch.randn(2, 2), sampler=config, steps=3)
    assert sample(swirl, torch.ones(1, 2), sampler=Euler.Config(), steps=1).nfe == 1


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sampler": "eulre"}, ValueError, r"unknown sampler 'eulre'; did you mean 'euler'"),
        ({"sampler": {"name": "dopri5", "rtoll": 1}}, ValueError, "did you mean 'rtol'"),
        ({"sampler": {"name": "dopri5", "rtol": "x"}}, TypeError, "expected float"),
        ({"sampler": 3}, TypeError, "expected str or a dict or Config"),
        ({"steps": 0}, ValueError, r"must lie in \[1, 1000000\], got 0"),
        ({"steps": -2}, ValueError, "got -2"),
        ({"steps": 2.0}, TypeError, "expected int"),
        ({"guidance": 2.0}, TypeError, r"guidance: expected Guidance\(scale, null\), got 2.0"),
        ({"sampler": "sde-euler", "reverse": True}, ValueError, "from noise to data only"),
    ],
)
def test_bad_arguments(options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sample(swirl, torch.randn(2, 2), **options)


def test_bad_starts_and_velocities() -> None:
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        sample(swirl, torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"got \[\[1.0\]\]"):
        sample(swirl, [[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"answered \(2, 4\) for x \(2, 2\).*adapt"):
        sample(lambda x, t: torch.cat([x, x], 1), torch.randn(2, 2))

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return x / (t[:, None] < 0.45)

    with pytest.raises(ValueError, match=r"not finite at step 6 of 10, t=0\.5"):
        sample(broken, torch.randn(2, 2))
    with pytest.raises(ValueError, match="not finite"):
        sample(broken, torch.randn(2, 2), sampler=Dopri5.Config())
