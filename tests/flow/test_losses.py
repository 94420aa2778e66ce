from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effformer import registry
from effformer.config import resolve
from effformer.flow import (
    Distillation,
    Fixed,
    FlowMatching,
    KStep,
    PseudoHuber,
    Uniform,
    cosine_distance,
    get_path,
    loss_weight,
    reference,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.cat([x, t[:, None].to(x)], 1)))


@pytest.fixture
def case() -> tuple[Net, Tensor, Tensor, Tensor]:
    data, noise = torch.randn(2, 6, 4, dtype=torch.float64)
    return Net(), data, noise, torch.rand(6, dtype=torch.float64)


def test_flow_matching_equals_the_reference_forward_and_backward(case: Any) -> None:
    net, data, noise, t = case
    ours = FlowMatching(FlowMatching.Config())(net, data, noise=noise, t=t)
    slow = reference.flow_matching_loss(net, data, noise, t)
    torch.testing.assert_close(ours.per_sample, slow)
    torch.testing.assert_close(ours.loss, ours.per_sample.mean())
    parameters = list(net.parameters())
    for a, b in zip(
        torch.autograd.grad(ours.loss, parameters),
        torch.autograd.grad(slow.mean(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_cosine_distance_is_the_angle_over_channels() -> None:
    value, target = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)
    for b in range(2):
        total = 0.0
        for i in range(2):
            for j in range(2):
                a, c = value[b, :, i, j], target[b, :, i, j]
                total += float(1 - (a @ c) / (a.norm() * c.norm()))
        assert float(cosine_distance(value, target)[b]) == pytest.approx(total / 4)
    half = cosine_distance(value.half(), target.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(cosine_distance(value, 3 * value).sum(), torch.tensor(0.0).double())


def test_cosine_is_added_with_its_weight_and_not_weighted_by_time(case: Any) -> None:
    net, data, noise, t = case
    plain = FlowMatching(FlowMatching.Config())(net, data, noise=noise, t=t)
    both = FlowMatching(FlowMatching.Config(cosine=0.5))(net, data, noise=noise, t=t)
    angle = 1 - torch.cosine_similarity(net(plain.x, t), data - noise, dim=1)
    torch.testing.assert_close(both.per_sample, plain.per_sample + 0.5 * angle)
    options: dict[str, Any] = {"prediction": "noise", "weight": "velocity"}
    plain = FlowMatching(FlowMatching.Config(**options))(net, data, noise=noise, t=t)
    both = FlowMatching(FlowMatching.Config(**options, cosine=2.0))(net, data, noise=noise, t=t)
    angle = 1 - torch.cosine_similarity(net(plain.x, t), noise, dim=1)
    torch.testing.assert_close(both.per_sample, plain.per_sample + 2 * angle)
    with pytest.raises(ValueError, match="cosine must be at least 0, got -1"):
        FlowMatching(FlowMatching.Config(cosine=-1.0))


def test_half_sum(case: Any) -> None:
    net, data, noise, t = case
    mean = FlowMatching(FlowMatching.Config())(net, data, noise=noise, t=t)
    half = FlowMatching(FlowMatching.Config(reduction="half-sum"))(net, data, noise=noise, t=t)
    torch.testing.assert_close(half.loss, mean.loss * 4 / 2)


def test_pseudo_huber_equals_the_reference_forward_and_backward(case: Any) -> None:
    net, data, noise, t = case
    ours = PseudoHuber(PseudoHuber.Config(factor=0.1))(net, data, noise=noise, t=t)
    x = t[:, None] * data + (1 - t[:, None]) * noise
    slow = reference.pseudo_huber_loss(net(x, t), data - noise, 0.1)
    torch.testing.assert_close(ours.per_sample, slow)
    parameters = list(net.parameters())
    for a, b in zip(
        torch.autograd.grad(ours.loss, parameters),
        torch.autograd.grad(slow.mean(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("scale", "power"), [(1e-4, 2.0), (1e3, 1.0)])
def test_pseudo_huber_is_square_for_small_and_linear_for_large_errors(
    scale: float, power: float
) -> None:
    criterion = PseudoHuber(PseudoHuber.Config(factor=0.1))
    data, noise, t = torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1)

    def loss(error: float) -> float:
        return float(criterion(lambda x, t: torch.full_like(x, error), data, noise=noise, t=t).loss)

    assert loss(2 * scale) / loss(scale) == pytest.approx(2**power, rel=1e-3)
    if power == 2:  # |e|^2 / (2 c d), c = factor d
        assert loss(scale) == pytest.approx(4 * scale**2 / (2 * 0.1 * 4 * 4), rel=1e-3)


def test_pseudo_huber_constant_grows_with_the_number_of_elements() -> None:
    """c = 0.00054 d: an image of twice the side has four times the c."""
    criterion = PseudoHuber(PseudoHuber.Config())
    values = []
    for side in (8, 16):
        data = torch.zeros(1, 3, side, side)
        out = criterion(lambda x, t: torch.full_like(x, 1e-5), data, noise=data, t=torch.zeros(1))
        d = 3 * side * side
        values.append(float(out.loss) * 2 * (0.00054 * d) / 1e-10)
    assert values == pytest.approx([1, 1], rel=1e-3)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data"])
def test_a_perfect_network_has_no_loss(case: Any, path: str, prediction: Any) -> None:
    _, data, noise, t = case
    plan = get_path(path).plan(t, data, noise)
    answer = get_path(path).convert(plan.velocity, plan.x, t, "velocity", prediction)
    criterion = FlowMatching(FlowMatching.Config(path=path, prediction=prediction))
    out = criterion(lambda x, t: answer, data, noise=noise, t=t)
    assert float(out.loss) < 1e-10
    torch.testing.assert_close(out.x, plan.x)


@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_weights(case: Any, prediction: Any) -> None:
    net, data, noise, t = case
    path, weights = get_path("linear"), {"velocity": ((1 - t) / t) ** 2 / (1 - t) ** 2}
    weights["likelihood"] = ((1 - t) / t) / (1 - t) ** 2

    def loss(weight: Any) -> Tensor:
        config = FlowMatching.Config(prediction=prediction, weight=weight)
        return FlowMatching(config)(net, data, noise=noise, t=t).per_sample

    for weight, expected in weights.items():
        torch.testing.assert_close(loss_weight(path, t, weight), expected)  # type: ignore[arg-type]
        torch.testing.assert_close(loss(weight), expected * loss("none"))


def test_distillation_without_perception_is_reflow_at_its_time(case: Any) -> None:
    net, data, noise, _ = case
    one_step = Distillation(Distillation.Config())(net, data, noise=noise)
    reflow = FlowMatching(FlowMatching.Config(time=Fixed(t=1e-3)))(net, data, noise=noise)
    torch.testing.assert_close(one_step.loss, reflow.loss)
    assert one_step.t.tolist() == pytest.approx([1e-3] * 6)


def test_distillation_compares_the_one_step_sample_with_the_data(case: Any) -> None:
    net, data, noise, _ = case
    seen: list[Tensor] = []

    def perceptual(a: Tensor, b: Tensor) -> Tensor:
        seen.extend([a, b])
        return (a - b).abs().mean(1)

    config = Distillation.Config(l2=2.0, perceptual=3.0)
    out = Distillation(config, perceptual)(net, data, noise=noise)
    torch.testing.assert_close(seen[0], noise + out.prediction)
    torch.testing.assert_close(seen[1], data)
    l2 = (out.prediction - (data - noise)).square().mean(1)
    expected = 2 * l2 + 3 * perceptual(noise + out.prediction, data)
    torch.testing.assert_close(out.per_sample, expected)


def test_what_is_not_given_is_drawn_from_the_generator(case: Any) -> None:
    net, data, _, _ = case
    criterion = FlowMatching(FlowMatching.Config(time=Uniform(low=0.2, high=0.3)))
    runs = [criterion(net, data, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    torch.testing.assert_close(runs[0].loss, runs[1].loss, rtol=0, atol=0)
    assert not torch.equal(runs[0].loss, runs[2].loss)
    assert ((runs[0].t >= 0.2) & (runs[0].t <= 0.3)).all()
    k_step = FlowMatching(FlowMatching.Config(time=KStep(k=2, eps=0.0)))(net, data)
    assert set(k_step.t.tolist()) <= {0.0, 0.5}


def test_half_precision_networks_see_half_precision_data_and_float32_times() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        assert (x.dtype, t.dtype) == (torch.bfloat16, torch.float32)
        return x

    data = torch.randn(3, 4, dtype=torch.bfloat16)
    assert FlowMatching(FlowMatching.Config())(network, data).loss.dtype == torch.float32


def test_conditions_reach_the_network() -> None:
    def network(x: Tensor, t: Tensor, *, y: Tensor) -> Tensor:
        return x * y[:, None]

    data = torch.randn(3, 4)
    out = FlowMatching(FlowMatching.Config())(network, data, y=torch.zeros(3))
    assert not out.prediction.any()


def test_names_and_json() -> None:
    for name, cls in (
        ("mse", FlowMatching),
        ("rectified-flow", FlowMatching),
        ("pseudo-huber", PseudoHuber),
    ):
        assert registry.loss.get(name).build is cls
    spec = {"name": "flow-matching", "time": {"name": "u-shaped", "a": 2.0}, "path": "gvp"}
    config = resolve("loss", spec)
    assert isinstance(config, FlowMatching.Config)
    assert resolve("loss", config.to_dict()) == config
    for entry in registry.loss:
        assert entry.config is not None
        entry.build(entry.config())


def test_errors(case: Any) -> None:
    net, data, noise, t = case
    criterion = FlowMatching(FlowMatching.Config())
    with pytest.raises(ValueError, match=r"needs prediction 'noise' or 'score'"):
        FlowMatching(FlowMatching.Config(weight="velocity"))
    with pytest.raises(ValueError, match="unknown time law 'unifrom'; did you mean 'uniform'"):
        FlowMatching(FlowMatching.Config(time="unifrom"))
    with pytest.raises(ValueError, match=r"data \(6, 4\) and noise \(3, 4\) do not fit"):
        criterion(net, data, noise=noise[:3])
    with pytest.raises(ValueError, match=r"data \(6, 4\) and t \(3,\) do not fit"):
        criterion(net, data, t=t[:3])
    with pytest.raises(TypeError, match="data: expected a tensor"):
        criterion(net, data.long())
    with pytest.raises(ValueError, match=r"becomes a velocity by effformer\.flow\.adapt"):
        criterion(lambda x, t: torch.cat([x, x], 1), data)
    with pytest.raises(ValueError, match="needs a distance"):
        Distillation(Distillation.Config(perceptual=1.0))
    with pytest.raises(ValueError, match="both weights are 0"):
        Distillation(Distillation.Config(l2=0.0))
    with pytest.raises(ValueError, match=r"answer of perceptual: expected shape \(6,\), got \(\)"):
        Distillation(Distillation.Config(perceptual=1.0), lambda a, b: a.mean())(
            net, data, noise=noise
        )
    with pytest.raises(ValueError, match="factor must be positive"):
        PseudoHuber(PseudoHuber.Config(factor=0.0))
    with pytest.raises(ValueError, match="did you mean 'flow-matching'"):
        registry.loss.get("flow-maching")


@pytest.mark.slow
def test_training_and_reflow_straighten_a_toy_flow() -> None:
    """Reflow lowers the straightness measure and does not raise the transport cost."""
    from effformer.flow import sample, straightness

    generator = torch.Generator().manual_seed(0)

    def target(n: int) -> Tensor:
        side = torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1
        spread = torch.randn(n, 2, generator=generator) * 0.3
        return spread + torch.cat([side * 2.0, torch.zeros(n, 1)], 1)

    def train(pairs: Any, start: nn.Module | None = None) -> Any:
        net = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )
        if start is not None:
            net.load_state_dict(start.state_dict())
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        criterion = FlowMatching(FlowMatching.Config())

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return net(torch.cat([x, t[:, None]], 1))

        for _ in range(1500):
            noise, data = pairs()
            loss = criterion(velocity, data, noise=noise, generator=generator).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return net, velocity

    first, v1 = train(lambda: (torch.randn(512, 2, generator=generator), target(512)))
    z0 = torch.randn(4096, 2, generator=generator)
    z1 = sample(v1, z0, sampler="rk4", steps=20).x

    def pairs() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, 4096, (512,), generator=generator)
        return z0[chosen], z1[chosen]

    _, v2 = train(pairs, first)
    runs = [sample(v, z0, steps=50, trajectory=True) for v in (v1, v2)]
    crooked = [float(straightness(r.trajectory)) for r in runs if r.trajectory is not None]
    assert crooked[1] < 0.3 * crooked[0]
    costs = [float((r.x - z0).square().sum(1).mean()) for r in runs]
    assert costs[1] < 1.02 * costs[0]
    assert costs[0] < float((target(4096) - z0).square().sum(1).mean())
