from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from effformer.cache import Newton, Predictor, Taylor

UNEVEN = (0.0, 0.07, 0.3, 0.34, 0.8)


def polynomial(t: Tensor, degree: int) -> Tensor:
    """(B,) -> (B, 2, 3)."""
    powers = torch.stack([(n + 1.0) * t**n for n in range(degree + 1)]).sum(dim=0)
    return powers[:, None, None] * torch.arange(1.0, 7).view(2, 3)


def learned(predictor: Predictor, times: list[float], degree: int) -> None:
    for k, t in enumerate(times):
        time = torch.tensor([t, t + 0.01], dtype=torch.float64)
        predictor.learn(polynomial(time, degree), k, time)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_newton_is_exact_for_polynomials_of_its_degree_on_uneven_times(degree: int) -> None:
    predictor = Newton(degree)
    assert not predictor.ready
    learned(predictor, list(UNEVEN), degree)
    ahead = torch.tensor([1.0, 1.3], dtype=torch.float64)
    assert_close(predictor.predict(9, ahead), polynomial(ahead, degree), rtol=1e-10, atol=1e-12)


def test_newton_takes_as_many_points_as_there_are() -> None:
    predictor = Newton(3)
    learned(predictor, [0.2, 0.5], 1)
    ahead = torch.tensor([0.9, 0.9], dtype=torch.float64)
    assert_close(predictor.predict(2, ahead), polynomial(ahead, 1), rtol=1e-10, atol=1e-12)


def test_newton_keeps_the_later_of_two_values_at_one_time() -> None:
    """The last stage of Heun's method and the first of the next step share a time."""
    predictor, time = Newton(2), torch.full((1,), 0.5)
    predictor.learn(torch.zeros(1, 1), 0, time)
    predictor.learn(torch.ones(1, 1), 1, time)
    assert predictor.predict(2, torch.tensor([0.7])).item() == 1


def test_taylor_is_exact_to_degree_one_and_reads_differences_above() -> None:
    """1 + 2k + 3k^2 at 0, 3, 6: the published rule says 191 at 8, the true value is 209."""
    straight, curved = Taylor(1), Taylor(2)
    for k in (0, 3, 6):
        time = torch.tensor([float(k)])
        straight.learn(1 + 2 * time, k, time)
        curved.learn(1 + 2 * time + 3 * time**2, k, time)
    assert straight.predict(8, torch.tensor([8.0])).item() == 17
    assert curved.predict(8, torch.tensor([8.0])).item() == 191
