from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from effformer.flow import TimeGrid, frechet_distance, reference, sample, straightness


def test_equals_the_reference() -> None:
    trajectory = torch.randn(9, 4, 3, 2, dtype=torch.float64)
    ours = straightness(trajectory, per_sample=True)
    torch.testing.assert_close(ours, reference.straightness(trajectory))
    torch.testing.assert_close(straightness(trajectory), ours.mean())
    torch.testing.assert_close(straightness(trajectory, reduce="mean"), ours.mean() / 6)


def test_straight_flows_have_none() -> None:
    """Deterministic pairs z1 = a z0 + b with a > 0: straight lines at constant speed."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        z0 = (x - t * 0.7) / (1 - t + t * 3.0)
        return 3.0 * z0 + 0.7 - z0

    z0 = torch.randn(4, 2, dtype=torch.float64)
    run = sample(velocity, z0, steps=8, trajectory=True)
    assert run.trajectory is not None
    assert float(straightness(run.trajectory)) < 1e-20
    torch.testing.assert_close(run.x, 3 * z0 + 0.7)
    torch.testing.assert_close(sample(velocity, z0, steps=1).x, run.x)
    torch.testing.assert_close(sample(velocity, z0, sampler="rk45").x, run.x)


def test_unequal_steps_are_weighted_by_their_width() -> None:
    speed = torch.ones(1, 2, dtype=torch.float64)
    grid = TimeGrid((0.0, 0.1, 0.5, 1.0))
    run = sample(lambda x, t: speed, torch.zeros(1, 2).double(), grid=grid, trajectory=True)
    assert run.trajectory is not None
    assert float(straightness(run.trajectory, run.times)) < 1e-20
    assert float(straightness(run.trajectory)) > 0.1
    fast = torch.tensor([0.0, 2.0, 2.0]).view(3, 1, 1)  # all of the way in a quarter of the time
    # chord 2 = 0.25 * (8 - 2)^2 + 0.75 * 2^2
    assert float(straightness(fast, (0.0, 0.25, 1.0))) == pytest.approx(0.25 * 36 + 0.75 * 4)
    # backwards it is as crooked
    assert float(straightness(fast.flip(0), (1.0, 0.25, 0.0))) == pytest.approx(12)


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected"):
        straightness(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="3 states have 2 times"):
        straightness(torch.zeros(3, 3, 1), (0.0, 1.0))


def test_distance_of_normal_distributions_is_known() -> None:
    """Samples whose means and covariances are exactly these: N(0, diag(a^2)) and N(m, diag(b^2))."""
    a, b, m = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5]), torch.tensor([1.0, -2.0])
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * 0.75**0.5
    found = frechet_distance(corners * a, corners * b + m)
    assert found == pytest.approx(float(m.square().sum() + (a - b).square().sum()), rel=1e-6)
    assert frechet_distance(corners * a, corners * a) == pytest.approx(0, abs=1e-12)


def test_distance_equals_the_formula() -> None:
    """tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of the product itself."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=rng, dtype=torch.float64)
    y = (
        torch.randn(50, 6, generator=rng, dtype=torch.float64)
        @ torch.randn(6, 6, generator=rng).double()
    )
    c1, c2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2)).real.sum()
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    expected = shift + np.trace(c1) + np.trace(c2) - 2 * roots
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    few = frechet_distance(x[:4], y)  # covariances of less than full rank
    assert few > 0


def test_distance_refuses() -> None:
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="do not fit"):
        frechet_distance(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(torch.full((5, 3), float("nan")), torch.zeros(5, 3))
