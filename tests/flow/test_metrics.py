from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effformer.flow import TimeGrid, reference, sample, straightness


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
