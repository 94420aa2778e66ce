from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from effformer.flow import TimeGrid, adapt, diffusion_coefficient, get_path, reference, sample
from effformer.flow.sde import DiffusionForm

FORMS = get_args(DiffusionForm)
PATHS = ["linear", "gvp", "vp"]


def field(path_name: str, mean: float = 1.0, std: float = 0.5) -> Any:
    """Exact velocity of a path from N(0, 1) to N(mean, std^2): E[u | x], u and x Gaussian."""
    path = get_path(path_name)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        alpha, dalpha, sigma, dsigma = (
            f(t)[:, None] for f in (path.alpha, path.dalpha, path.sigma, path.dsigma)
        )
        variance = alpha**2 * std**2 + sigma**2
        covariance = alpha * dalpha * std**2 + sigma * dsigma
        return dalpha * mean + covariance / variance * (x - alpha * mean)

    return velocity


CASES = [("sde-euler", path) for path in PATHS] + [("sde-heun", "linear")]


@pytest.mark.parametrize(("name", "path"), CASES)
@pytest.mark.parametrize("form", FORMS)
def test_same_distribution_as_the_ode(name: str, path: str, form: str) -> None:
    """With the exact velocity of a Gaussian the samples have its moments, whatever the noise."""
    x0 = torch.randn(5_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = sample(
        field(path),
        x0,
        sampler={"name": name, "path": path, "form": form, "last_step": "tweedie"},
        grid=TimeGrid.uniform(60, 0.02 if form == "sbdm" else 0.0, 0.96),
        generator=torch.Generator().manual_seed(1),
    )
    assert float(out.x.mean()) == pytest.approx(1.0, abs=0.05)
    # Tweedie's expected data spreads a little less than the data
    assert float(out.x.std()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("path", PATHS)
def test_no_diffusion_is_euler(path: str) -> None:
    x0 = torch.randn(4, 1)
    velocity = field(path)
    options = {"name": "sde-euler", "path": path, "form": "constant", "norm": 0.0}
    sde = sample(velocity, x0, sampler=options | {"last_step": "euler"}, steps=9)
    points = TimeGrid((*TimeGrid.uniform(8, 0.0, 0.96).points, 1.0))
    torch.testing.assert_close(sde.x, sample(velocity, x0, grid=points).x)
    heun = sample(velocity, x0, sampler=options | {"name": "sde-heun"}, steps=9).x
    ode = sample(velocity, x0, sampler="heun", grid=TimeGrid.uniform(8, 0.0, 0.96)).x
    torch.testing.assert_close(heun, ode + 0.04 * velocity(ode, torch.full((4,), 0.96)))


def test_equals_the_reference() -> None:
    x0, noise = torch.randn(4, 1).double(), torch.randn(7, 4, 1).double()
    grid, velocity = TimeGrid.uniform(7, 0.1, 0.9), field("linear")
    ours = sample(
        velocity, x0, sampler={"name": "sde-euler", "last_step": "none"}, grid=grid, noise=noise
    )
    slow = reference.euler_maruyama(
        lambda x, t: velocity(x, torch.full((4,), t, dtype=x.dtype)),
        x0, grid.points, list(noise), lambda t: 1 - t,
    )  # fmt: skip
    torch.testing.assert_close(ours.x, slow)


@pytest.mark.parametrize("form", FORMS)
def test_coefficients(form: DiffusionForm) -> None:
    t, c = torch.tensor([0.25, 0.5], dtype=torch.float64), 0.7
    expected = {
        "constant": [c, c],
        "sbdm": [c * 3.0, c * 1.0],
        "sigma": [c * 0.75, c * 0.5],
        "linear": [c * 0.75, c * 0.5],
        "decreasing": [0.25 * (c * math.cos(math.pi / 4) + 1) ** 2, 0.25],
        "increasing-decreasing": [c * 0.5, c],
    }[form]
    ours = diffusion_coefficient(get_path("linear"), t, form, c)
    assert ours.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("last_step", ["mean", "euler", "tweedie", "none"])
def test_last_steps(last_step: str) -> None:
    x0 = torch.randn(4, 1, dtype=torch.float64)
    options = {"name": "sde-euler", "last_step": last_step, "last_step_size": 0.1}
    out = sample(
        field("linear"), x0, sampler=options, steps=10, trajectory=True,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert out.nfe == 10
    assert len(out.times) == 11
    if last_step == "none":
        assert out.times[-1] == 0.999
        return
    assert out.times[-2:] == pytest.approx((0.9, 1.0))
    assert out.trajectory is not None
    x, t = out.trajectory[-2], torch.full((4,), 0.9, dtype=torch.float64)
    v = field("linear")(x, t)
    score = (0.9 * v - x) / 0.1
    expected = {
        "mean": x + 0.1 * (v + 0.1 * score),
        "euler": x + 0.1 * v,
        "tweedie": x / 0.9 + 0.1**2 / 0.9 * score,
    }[last_step]
    torch.testing.assert_close(out.x, expected)


def test_the_singular_start_is_avoided_by_default_and_named_if_asked_for() -> None:
    x0 = torch.randn(4, 1)
    options = {"name": "sde-euler", "form": "sbdm"}
    out = sample(field("linear"), x0, sampler=options, steps=250)
    assert out.times[0] == 1e-3
    assert out.x.isfinite().all()
    with pytest.raises(ValueError, match=r"sbdm diffusion is infinite at t=0; start the grid"):
        sample(field("linear"), x0, sampler=options, grid=TimeGrid.uniform(9, 0.0, 0.96))
    assert sample(field("vp"), x0, sampler=options | {"path": "vp"}, steps=9).times[0] == 0


def test_generator_decides() -> None:
    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x0 = torch.zeros(4, 1)
        return sample(field("linear"), x0, sampler="sde-euler", generator=generator).x

    torch.testing.assert_close(run(1), run(1), rtol=0, atol=0)
    assert not torch.equal(run(1), run(2))


def test_errors() -> None:
    x0, velocity = torch.randn(4, 1), field("linear")
    with pytest.raises(ValueError, match="needs steps >= 2"):
        sample(velocity, x0, sampler="sde-euler", steps=1)
    with pytest.raises(ValueError, match=r"end the grid at 0\.96"):
        sample(velocity, x0, sampler="sde-euler", grid=TimeGrid.uniform(5))
    with pytest.raises(ValueError, match="noise for 2 steps is not enough"):
        sample(velocity, x0, sampler="sde-euler", steps=5, noise=torch.zeros(2, 4, 1))
    with pytest.raises(ValueError, match="unknown path 'linaer'"):
        sample(velocity, x0, sampler={"name": "sde-euler", "path": "linaer"})
    with pytest.raises(ValueError, match="did you mean 'sigma'"):
        sample(velocity, x0, sampler={"name": "sde-euler", "form": "sigmaa"})


def test_stochastic_euler_keeps_the_marginals_and_the_official_formula_does_not() -> None:
    x0 = torch.randn(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def spread(**options: Any) -> float:
        out = sample(
            field("linear"), x0, sampler={"name": "stochastic-euler", "sigma": 3.0} | options,
            steps=200, generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        return float(out.x.std())

    assert spread() == pytest.approx(0.5, abs=0.01)
    assert abs(spread(repo_formula=True) - 0.5) > 0.05


def test_stochastic_euler_is_euler_without_noise_and_agrees_with_the_sde() -> None:
    x0, noise = torch.randn(4, 1).double(), torch.randn(8, 4, 1).double()
    velocity = field("linear")
    still = sample(velocity, x0, sampler={"name": "stochastic-euler", "sigma": 0.0}, steps=8)
    torch.testing.assert_close(still.x, sample(velocity, x0, steps=8).x)
    grid, sigma = TimeGrid.uniform(8, 0.0, 0.9), 0.8
    ours = sample(
        velocity, x0, sampler={"name": "stochastic-euler", "sigma": sigma}, grid=grid, noise=noise
    )
    slow = reference.euler_maruyama(
        lambda x, t: velocity(x, torch.full((4,), t, dtype=x.dtype)),
        x0, grid.points, list(noise), lambda t: (sigma * (1 - t)) ** 2 / 2,
    )  # fmt: skip
    torch.testing.assert_close(ours.x, slow)


@pytest.mark.parametrize("prediction", ["noise", "score", "data"])
def test_networks_of_other_predictions(prediction: Any) -> None:
    """A score network gives the same SDE as the velocity that it stands for."""
    path, velocity = get_path("gvp"), field("gvp")

    def network(x: Tensor, t: Tensor) -> Tensor:
        return path.convert(velocity(x, t), x, t, "velocity", prediction)

    x0, noise = torch.randn(4, 1).double(), torch.randn(8, 4, 1).double()
    options = {"name": "sde-euler", "path": "gvp", "form": "decreasing"}
    grid = TimeGrid.uniform(8, 0.01, 0.96)
    runs = [
        sample(v, x0, sampler=options, grid=grid, noise=noise).x
        for v in (velocity, adapt(network, "sit", path="gvp", prediction=prediction))
    ]
    torch.testing.assert_close(runs[1], runs[0])
