from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from effformer.flow import DDPM, GVP, VP, Diffusion, Linear, get_path, reference
from effformer.flow.paths import PATHS, Prediction, time_interval
from effformer.flow.paths import Path as FlowPath

ALL = [Linear(), Linear(sigma_min=1e-2), GVP(), VP(), VP(beta0=0.85, beta1=12.0), DDPM()]
KINDS = get_args(Prediction)


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_derivatives_equal_autograd(path: FlowPath) -> None:
    t = torch.linspace(0.0123, 0.9876, 31, dtype=torch.float64, requires_grad=True)
    for value, derivative in ((path.alpha, path.dalpha), (path.sigma, path.dsigma)):
        (slope,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(derivative(t).detach(), slope)


@pytest.mark.parametrize("name", ["linear", "gvp", "vp"])
def test_coefficients_equal_the_reference(name: str) -> None:
    path = get_path(name)
    for t in (0.01, 0.2, 0.5, 0.97):
        time = torch.tensor(t, dtype=torch.float64)
        ours = [float(f(time)) for f in (path.alpha, path.dalpha, path.sigma, path.dsigma)]
        assert ours == pytest.approx(reference.coefficients(name, t), rel=1e-12)


@pytest.mark.parametrize("path", [Linear(), GVP()], ids=repr)
def test_ends(path: FlowPath) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.alpha(ends), ends)
    torch.testing.assert_close(path.sigma(ends), 1 - ends)


def test_vp_starts_almost_at_noise() -> None:
    assert float(VP().alpha(torch.tensor(0.0))) == pytest.approx(0.00657, abs=1e-5)


@pytest.mark.parametrize("name", ["linear", "gvp", "vp"])
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(KINDS, 2)))
def test_conversions_equal_the_reference(name: str, source: str, target: str) -> None:
    x, value = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    t = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64)
    ours = get_path(name).convert(value, x, t, source, target)  # type: ignore[arg-type]
    expected = reference.convert(name, value, x, t, source, target)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ALL, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_the_identity(path: FlowPath, kind: Prediction) -> None:
    x, v = torch.randn(2, 3, 5, dtype=torch.float64)
    t = torch.tensor([0.0521, 0.4567, 0.9432], dtype=torch.float64)
    there = path.convert(v, x, t, "velocity", kind)
    torch.testing.assert_close(path.convert(there, x, t, kind, "velocity"), v)


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_plan_has_the_predictions_that_it_was_made_of(path: FlowPath) -> None:
    x1, x0 = torch.randn(2, 3, 5, dtype=torch.float64)
    t = torch.tensor([0.0521, 0.4567, 0.9432], dtype=torch.float64)
    point = path.plan(t, x1, x0)
    ends = path.ends(point.velocity, point.x, t)
    torch.testing.assert_close(ends.data, x1)
    torch.testing.assert_close(ends.noise, x0)


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_velocity_is_ratio_and_gain(path: FlowPath) -> None:
    """Velocity = r x + g score: how SiT writes the same conversion."""
    x, score = torch.randn(2, 3, 5, dtype=torch.float64)
    t = torch.tensor([0.0521, 0.4567, 0.9432], dtype=torch.float64)
    expected = path.ratio(t)[:, None] * x + path.gain(t)[:, None] * score
    torch.testing.assert_close(path.convert(score, x, t, "score", "velocity"), expected)


@pytest.mark.parametrize("path", ALL, ids=repr)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
def test_conversions_are_finite_at_both_ends(
    path: FlowPath, source: Prediction, target: Prediction
) -> None:
    x, value = torch.randn(2, 2, 5)
    t = torch.tensor([0.0, 1.0])
    assert path.convert(value, x, t, source, target).isfinite().all()


def test_velocity_gives_data_and_noise_exactly_at_the_ends() -> None:
    x1, x0 = torch.randn(2, 2, 5)
    t = torch.tensor([0.0, 1.0])
    for path in (Linear(), GVP()):
        point = path.plan(t, x1, x0)
        ends = path.ends(point.velocity, point.x, t)
        torch.testing.assert_close(ends.data, x1)
        torch.testing.assert_close(ends.noise, x0)


@pytest.mark.parametrize("schedule", ["linear", "scaled-linear"])
def test_ddpm_path_stands_on_the_discrete_schedule(schedule: str) -> None:
    path = DDPM(steps=50, beta_start=1e-3, beta_end=0.1, schedule=schedule)  # type: ignore[arg-type]
    process = Diffusion.from_path(path)
    t = 1 - (torch.arange(50, dtype=torch.float64) + 1) / 50
    torch.testing.assert_close(path.alpha(t) ** 2, process.alphas_cumprod)
    assert float(process.betas[0]) == pytest.approx(1e-3)
    assert float(process.betas[-1]) == pytest.approx(0.1)
    assert float(path.sigma(torch.tensor(1.0))) == 0


def test_time_intervals_are_those_of_the_official_runs() -> None:
    runs = json.loads((Path(__file__).parents[1] / "golden" / "sit.json").read_text())["runs"]
    for run in runs:
        low, high = time_interval(
            run["path"].lower(), run["prediction"],
            stochastic=run["tag"].startswith("sde"), sbdm=run.get("diffusion_form") == "SBDM",
            last_step=run.get("last_step_size", 0.0),
        )  # fmt: skip
        ours = (1 - low, 1 - high) if run.get("reverse") else (low, high)
        assert ours == pytest.approx((run["t0"], run["t1"])), run["tag"]
    assert time_interval("linear", stochastic=True, sbdm=True) == (1e-3, 1 - 1e-3)
    assert time_interval("vp", train=True) == (0.0, 1 - 1e-5)
    assert time_interval("gvp", train=True) == (0.0, 1.0)


def test_names_and_json() -> None:
    for path in ALL:
        assert FlowPath.from_dict(path.to_dict()) == path
        assert isinstance(get_path(path.name), PATHS[path.name])
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        get_path("linaer")
    with pytest.raises(ValueError, match="unknown option 'beta2'"):
        FlowPath.from_dict({"name": "vp", "beta2": 3.0})
    with pytest.raises(TypeError, match="expected Path or a dict of its options or str, got 3"):
        get_path(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown value 'speed'"):
        Linear().convert(torch.ones(1), torch.ones(1), torch.ones(1), "velocity", "speed")  # type: ignore[arg-type]
