"""Densities of normalizing flows against closed forms."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn

from effformer.config import resolve
from effformer.flow import Likelihood, bits_per_dim, denoised, log_likelihood

SCALE, SHIFT, NUMBERS = 2.0, 0.5, 12


class Answer(NamedTuple):
    z: Tensor
    log_det: Tensor


def gaussian(x: Tensor, factor: float = 1.0) -> Answer:
    """The flow of data N(SHIFT, SCALE^2)."""
    z = (x - SHIFT) / SCALE * factor
    log_det = x.new_full((len(x),), NUMBERS * math.log(factor / SCALE))
    return Answer(z, log_det)


def data(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def density(x: Tensor) -> Tensor:
    mean, deviation = x.new_tensor(SHIFT), x.new_tensor(SCALE)
    return torch.distributions.Normal(mean, deviation).log_prob(x).flatten(1).sum(1)


def test_the_density_is_that_of_the_distribution() -> None:
    x = data()
    assert_close(log_likelihood(gaussian, x), density(x), rtol=1e-12, atol=1e-12)
    other = log_likelihood(gaussian, x, factor=1.1)  # conditions reach the model
    assert (other != density(x)).all()


def test_bits_count_what_a_code_of_the_levels_needs() -> None:
    """-log2 of the density times the width of a level, per number."""
    x = data()
    for levels, ends in ((256, (-1.0, 1.0)), (10, (0.0, 5.0))):
        width = (ends[1] - ends[0]) / levels
        expected = -(density(x) + NUMBERS * math.log(width)) / NUMBERS / math.log(2)
        found = bits_per_dim(gaussian, x, levels=levels, value_range=ends)
        assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"value_range must increase, got 1\.0 and 1\.0"):
        bits_per_dim(gaussian, x, value_range=(1.0, 1.0))


def test_denoising_is_the_posterior_mean_of_a_gaussian() -> None:
    """Data N(m, s^2 - n^2) with noise n: E[x | noisy] = m + (1 - n^2 / s^2) (noisy - m)."""
    x, noise = data(), 0.7
    expected = SHIFT + (1 - noise**2 / SCALE**2) * (x - SHIFT)
    with torch.no_grad():
        assert_close(denoised(gaussian, x, noise), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(denoised(gaussian, x, 0.0), x)
    half = denoised(gaussian, x, noise, strength=0.5)
    assert_close(half, (x + expected) / 2, rtol=1e-12, atol=1e-12)


def test_the_loss_is_the_density_per_number_without_its_constant() -> None:
    x, seen = data(), Likelihood(Likelihood.Config(noise=0.0))
    out = seen(gaussian, x)
    expected = -density(x) / NUMBERS - 0.5 * math.log(2 * math.pi)
    assert_close(out.per_sample, expected, rtol=1e-12, atol=1e-12)
    assert_close(out.loss, expected.mean(), rtol=1e-12, atol=1e-12)
    noisy = [
        Likelihood(Likelihood.Config(noise=0.3))(
            gaussian, x, generator=torch.Generator().manual_seed(3)
        )
        for _ in range(2)
    ]
    assert torch.equal(noisy[0].x, noisy[1].x)
    assert float((noisy[0].x - x).std()) == pytest.approx(0.3, rel=0.3)


def test_levels_fill_their_cells() -> None:
    levels = torch.tensor([0, 3, 255]).expand(200, 3) / 127.5 - 1
    out = Likelihood(Likelihood.Config(noise=0.0, levels=256))(
        lambda x: Answer(x, x.new_zeros(len(x))), levels, generator=torch.Generator().manual_seed(0)
    )
    cells = (out.x + 1) * 128
    assert torch.equal(cells.floor(), torch.tensor([0.0, 3.0, 255.0]).expand(200, 3))
    assert float((cells - cells.floor()).mean()) == pytest.approx(0.5, abs=0.05)
    assert isinstance(resolve("loss", {"name": "likelihood", "noise": 0.1}), Likelihood.Config)
    with pytest.raises(ValueError, match="levels=256 get uniform noise; noise must then be 0"):
        Likelihood.Config(levels=256)


@pytest.mark.parametrize("ask", [log_likelihood, bits_per_dim, lambda m, x: denoised(m, x, 0.1)])
def test_other_models_are_refused(ask: Any) -> None:
    with pytest.raises(TypeError, match=r"Linear is no normalizing flow, whose answer has z"):
        ask(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"log_det of the model: expected shape \(2,\), got \(\)"):
        ask(lambda x: Answer(x, x.sum()), torch.randn(2, 3))
