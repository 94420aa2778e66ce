from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effformer.flow import Diffusion, reference, space_timesteps


@pytest.mark.parametrize("step", [0, 1, 7, 19])
def test_posterior_is_bayes_rule(step: int) -> None:
    betas = torch.linspace(0.01, 0.3, 20, dtype=torch.float64)
    process = Diffusion(betas, variance="fixed-small")
    x0, x = torch.tensor([[0.3]]).double(), torch.tensor([[-0.8]]).double()
    mean, variance, abar = reference.ddpm_posterior(betas.tolist(), step, 0.3, -0.8)
    eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    out = process.p_mean_variance(lambda x, t: eps, x, torch.tensor([step]))
    assert float(out.data) == pytest.approx(0.3)
    assert float(out.mean) == pytest.approx(mean)
    if step > 0:
        assert float(out.variance) == pytest.approx(variance)


def test_variances() -> None:
    betas = torch.linspace(0.01, 0.3, 20, dtype=torch.float64)
    x, step = torch.randn(2, 3, 4, 4), torch.tensor([3, 9])

    def variance(kind: Any, logit: float = 0.0) -> Tensor:
        def network(x: Tensor, t: Tensor) -> Tensor:
            return torch.cat([x, torch.full_like(x, logit)], 1) if kind == "learned-range" else x

        return Diffusion(betas, variance=kind).p_mean_variance(network, x, step).variance

    torch.testing.assert_close(variance("learned-range", 1.0), variance("fixed-large"))
    torch.testing.assert_close(variance("learned-range", -1.0), variance("fixed-small"))
    torch.testing.assert_close(variance("fixed-large")[:, 0, 0, 0], betas[step].float())


def test_the_bound_trains_the_variance_alone() -> None:
    process = Diffusion.linear(100)
    eps, logits = (torch.randn(4, 2, 3, 3, requires_grad=True) for _ in range(2))
    step = torch.tensor([0, 1, 50, 99])
    out = process.training_losses(
        lambda x, t: torch.cat([eps, logits], 1), torch.rand(4, 2, 3, 3) * 2 - 1, step,
        torch.randn(4, 2, 3, 3),
    )  # fmt: skip
    assert out.vb is not None
    for_eps, for_logits = torch.autograd.grad(out.vb.sum(), [eps, logits])
    assert not for_eps.any()
    assert for_logits.abs().amax((1, 2, 3)).gt(0).all()
    torch.testing.assert_close(out.loss, out.mse + out.vb)


def test_decoder_bins_add_up_to_one() -> None:
    from effformer.flow.diffusion import _discretized_log_likelihood

    centres = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_scale in ((0.1, -2.0), (-0.95, -4.0), (1.3, -1.0)):
        log_p = _discretized_log_likelihood(
            centres, torch.tensor(mean).double(), torch.tensor(log_scale).double()
        )
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_respacing() -> None:
    assert space_timesteps(1000, "10") == tuple(round(i * 999 / 9) for i in range(10))
    assert (
        space_timesteps(1000, 250) == space_timesteps(1000, "250") == space_timesteps(1000, [250])
    )
    assert space_timesteps(1000, "ddim50") == tuple(range(0, 1000, 20))
    assert space_timesteps(300, "10,15,20")[:10] == tuple(round(i * 99 / 9) for i in range(10))
    assert len(space_timesteps(300, (10, 15, 20))) == 45
    assert space_timesteps(10, "1") == (0,)
    full = Diffusion.linear(1000)
    short = full.respace(space_timesteps(1000, "10"))
    torch.testing.assert_close(short.alphas_cumprod, full.alphas_cumprod[list(short.timesteps)])
    assert Diffusion.linear(1000, "10").timesteps == short.timesteps
    twice = full.respace(range(0, 1000, 10)).respace(range(0, 100, 10))
    assert twice.timesteps == tuple(range(0, 1000, 100))


@pytest.mark.parametrize("method", ["ddim", "ancestral"])
def test_a_perfect_network_finds_the_data(method: Any) -> None:
    process = Diffusion.linear(1000, "25", variance="fixed-small")
    data = torch.randn(2, 3, 4, 4).clamp(-1, 1)

    def network(x: Tensor, label: Tensor) -> Tensor:
        abar = Diffusion.linear(1000).alphas_cumprod[label].float()[:, None, None, None]
        return (x - abar.sqrt() * data) / (1 - abar).sqrt()

    seen: list[tuple[int, int]] = []
    out = process.sample(
        network, torch.randn(2, 3, 4, 4), method=method, progress=lambda *a: seen.append(a),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    torch.testing.assert_close(out, data, rtol=1e-3, atol=1e-3)
    assert seen == [(i + 1, 25) for i in range(25)]


def test_ddim_with_eta_one_is_ancestral() -> None:
    process = Diffusion.linear(100, variance="fixed-small")
    x, noise = torch.randn(2, 4, 3, 4, 4)
    step = torch.tensor([99, 50, 1, 0])

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x)

    torch.testing.assert_close(
        process.ddim_step(network, x, step, eta=1.0, noise=noise),
        process.ancestral_step(network, x, step, noise),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_sampling_is_reproducible_and_clips() -> None:
    process = Diffusion.linear(50, variance="fixed-large")

    def run(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return process.sample(
            lambda x, t: x * 0, torch.ones(1, 1, 2, 2), generator=generator, **options
        )

    torch.testing.assert_close(run(1), run(1), rtol=0, atol=0)
    assert not torch.equal(run(1), run(2))
    assert float(run(1, method="ddim", clip=True).abs().max()) <= 1


def test_errors() -> None:
    process, x = Diffusion.linear(50), torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        Diffusion(torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match=r"respace a longer one: Diffusion\.linear\(1000, '10'\)"):
        Diffusion.linear(10)
    with pytest.raises(ValueError, match="2 betas, 1 timesteps"):
        Diffusion(torch.tensor([0.1, 0.5]), [0])
    with pytest.raises(ValueError, match="no integer stride gives 7"):
        space_timesteps(10, "ddim7")
    with pytest.raises(ValueError, match="cannot take 20 of a section of 10"):
        space_timesteps(10, 20)
    with pytest.raises(ValueError, match="expected '50', '10,20' or 'ddim50', got 'fast'"):
        space_timesteps(10, "fast")
    with pytest.raises(ValueError, match="expects 6 channels"):
        process.p_mean_variance(lambda x, t: x, x, torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="integer indices"):
        process.p_mean_variance(lambda x, t: x, x, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="unknown method 'dpm'"):
        process.sample(lambda x, t: x, x, method="dpm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs noise"):
        process.ddim_step(lambda x, t: x, x, torch.tensor([1, 2]), eta=0.5)


@pytest.mark.parametrize("method", ["ddim", "ancestral"])
def test_the_state_of_half_precision_networks_is_float32(method: Any) -> None:
    process, exact = Diffusion.linear(50, variance="fixed-small"), torch.randn(2, 3, 4)

    def network(x: Tensor, t: Tensor) -> Tensor:
        asked.append(x.dtype)
        return (0.3 * exact).to(x.dtype)

    asked: list[torch.dtype] = []
    drawn = [
        process.sample(network, x, method=method, generator=torch.Generator().manual_seed(1))
        for x in (exact.bfloat16(), exact.bfloat16().float())
    ]
    assert set(asked[:50]) == {torch.bfloat16} == {drawn[0].dtype}
    # the answers differ by their rounding, the states by no more than these answers do
    torch.testing.assert_close(drawn[0].float(), drawn[1], rtol=2e-2, atol=2e-2)


def test_losses_of_half_precision_networks_are_float32() -> None:
    process, noise = Diffusion.linear(50, variance="fixed-small"), torch.randn(2, 3, 4).bfloat16()

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        return 0.9 * noise

    loss = process.training_losses(network, noise, torch.tensor([3, 30]), noise).loss
    expected = (noise.double() - (0.9 * noise).double()).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
