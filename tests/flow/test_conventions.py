from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effformer.flow import CONVENTIONS, Diffusion, FlowConvention, adapt, flip, sample
from effformer.flow.conventions import DIT, EFFFORMER, INSTAFLOW, RECTIFIED_FLOW, SD3, TRIPOSG
from effformer.flow.paths import Path, Prediction

# The table of who counts how: authors' time of data, path as (weight of data, weight of noise) and
# regression target as (data, noise) at the authors' time u, and what the network is told there.
_S = 1e-5
TABLE: dict[str, tuple[int, Any, Any, Any]] = {
    "rectified-flow": (1, lambda u: (u, 1 - u), (1, -1), lambda u: 999 * u),
    "slimflow": (1, lambda u: (u, 1 - u), (1, -1), lambda u: 999 * u),
    "slimflow-paper": (0, lambda u: (1 - u, u), (-1, 1), lambda u: u),
    "rfpp": (0, lambda u: (1 - u, u), (-1, 1), lambda u: math.log(u / (1 - u)) / 4),
    "instaflow": (1, lambda u: (u, 1 - u), (1, -1), lambda u: 1000 * (1 - u)),
    "mdt-dist": (0, lambda u: (1 - u, _S + (1 - _S) * u), (-1, 1 - _S), lambda u: 1000 * u),
    "trellis": (0, lambda u: (1 - u, _S + (1 - _S) * u), (-1, 1 - _S), lambda u: 1000 * u),
    "sd3": (0, lambda u: (1 - u, u), (-1, 1), lambda u: 1000 * u),
    "flux": (0, lambda u: (1 - u, u), (-1, 1), lambda u: u),
    "triposg": (0, lambda u: (1 - u, u), (1, -1), lambda u: 1000 * u),
    "flowsep": (1, lambda u: (u, 1 - (1 - 1e-4) * u), (1, -(1 - 1e-4)), lambda u: u),
    "torchcfm": (1, lambda u: (u, 1 - u), (1, -1), lambda u: u),
    "flow-matching": (1, lambda u: (u, 1 - u), (1, -1), lambda u: u),
    "sit": (1, lambda u: (u, 1 - u), (1, -1), lambda u: u),
    "lightningdit": (1, lambda u: (u, 1 - u), (1, -1), lambda u: u),
    "sit-paper": (0, lambda u: (1 - u, u), (-1, 1), lambda u: u),
    "effformer": (1, lambda u: (u, 1 - u), (1, -1), lambda u: u),
}


def test_the_table_is_complete() -> None:
    assert set(TABLE) | {"rectified-diffusion", "dit"} == set(CONVENTIONS)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("u", [0.1, 0.5, 0.8])
def test_every_row_of_the_table(name: str, u: float) -> None:
    """A perfect network written as its authors write it becomes our d x_t / dt."""
    data_at, weights, target, label = TABLE[name]
    convention = CONVENTIONS[name]
    data, noise = torch.randn(2, 2, 3, dtype=torch.float64)
    x = weights(u)[0] * data + weights(u)[1] * noise
    told = []

    def network(x: Tensor, label: Tensor) -> Tensor:
        told.append(label)
        return target[0] * data + target[1] * noise

    t = u if data_at == 1 else 1 - u
    velocity = adapt(network, name)(x, t)
    times = torch.full((2,), t, dtype=torch.float64)
    point = convention.path.plan(times, data, noise)
    torch.testing.assert_close(point.x, x)
    torch.testing.assert_close(velocity, point.velocity)
    torch.testing.assert_close(told[0], torch.full((2,), label(u), dtype=torch.float64))


@pytest.mark.parametrize("name", ["dit", "rectified-diffusion"])
@pytest.mark.parametrize("step", [0, 17, 500, 999])
def test_discrete_conventions_see_their_integer_steps(name: str, step: int) -> None:
    convention = CONVENTIONS[name]
    abar = Diffusion.from_path(convention.path).alphas_cumprod[step]  # type: ignore[arg-type]
    data, noise = torch.randn(2, 2, 4, dtype=torch.float64)
    x = abar.sqrt() * data + (1 - abar).sqrt() * noise
    told = []

    def network(x: Tensor, label: Tensor) -> Tensor:
        told.append(label)
        return torch.cat([noise, torch.zeros_like(noise)], 1) if convention.variance else noise

    t = torch.full((2,), 1 - (step + 1) / 1000, dtype=torch.float64)
    velocity = adapt(network, convention)(x, t)
    assert told[0].tolist() == [step, step]
    ends = convention.path.ends(velocity, x, t)
    torch.testing.assert_close(ends.data, data)
    torch.testing.assert_close(ends.noise, noise)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp", "ddpm"])
def test_any_prediction_becomes_the_same_velocity(prediction: Prediction, path: str) -> None:
    data, noise = torch.randn(2, 3, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    velocity = adapt(lambda x, label: x, "effformer", path=path, prediction=prediction)
    point = velocity.convention.path.plan(t, data, noise)
    answer = velocity.convention.path.convert(point.velocity, point.x, t, "velocity", prediction)
    velocity.network = lambda x, label: answer
    torch.testing.assert_close(velocity(point.x, t), point.velocity)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_flipping_twice_is_the_identity_and_once_describes_the_same_network(name: str) -> None:
    convention = CONVENTIONS[name]
    assert convention.flip().flip() == convention
    assert convention.flip() != convention
    weight = torch.randn(8, 4, dtype=torch.float64)

    def network(x: Tensor, label: Tensor) -> Tensor:
        out = torch.tanh(torch.cat([x, x * label[:, None].sin()], 1) @ weight)
        return torch.cat([out, out], 1) if convention.variance else out

    x, t = torch.randn(3, 4).double(), torch.tensor([0.123, 0.5, 0.877]).double()
    torch.testing.assert_close(
        adapt(network, convention.flip())(x, t), adapt(network, convention)(x, t)
    )


def test_flip_of_a_velocity() -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x * t[:, None] + 1

    x, t = torch.randn(3, 4), torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(flip(velocity)(x, t), -velocity(x, 1 - t))
    torch.testing.assert_close(flip(flip(velocity))(x, t), velocity(x, t))
    there = sample(velocity, x, sampler="rk4", steps=50).x
    back = sample(flip(velocity), there, sampler="rk4", steps=50).x
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_one_wrong_sign_or_scale_changes_the_answer() -> None:
    def network(x: Tensor, label: Tensor) -> Tensor:
        return x * (label / 500)[:, None]

    x, t = torch.ones(1, 2), torch.tensor([0.25])
    seen = {
        tuple(adapt(network, c)(x, t).flatten().tolist())
        for c in (EFFFORMER, RECTIFIED_FLOW, INSTAFLOW, SD3, TRIPOSG)
    }
    assert len(seen) >= 4


def test_labels_stay_in_float32_for_half_precision_networks() -> None:
    told = []

    def network(x: Tensor, label: Tensor) -> Tensor:
        told.append(label)
        return x

    adapt(network, "rectified-flow")(torch.randn(2, 3, dtype=torch.bfloat16), 0.777)
    assert told[0].dtype == torch.float32
    assert told[0].tolist() == pytest.approx([999 * 0.777] * 2)


def test_gradients_reach_the_network() -> None:
    layer = torch.nn.Linear(3, 3)
    field = adapt(lambda x, label: layer(x), "sd3")
    field(torch.randn(2, 3), 0.5).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("name", CONVENTIONS)
def test_json(name: str) -> None:
    convention = CONVENTIONS[name]
    assert FlowConvention.from_dict(convention.to_dict()) == convention
    assert isinstance(convention.path, Path)


def test_errors() -> None:
    with pytest.raises(ValueError, match="did you mean 'instaflow'"):
        adapt(lambda x, t: x, "instaflw")
    with pytest.raises(ValueError, match="unknown value 'speed'"):
        adapt(lambda x, t: x, "sd3", prediction="speed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown path 'quadratic'"):
        adapt(lambda x, t: x, "sd3", path="quadratic")
    with pytest.raises(
        TypeError, match="expected FlowConvention or a dict of its options or str, got 3"
    ):
        adapt(lambda x, t: x, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"answered \(.*, expected \(\d, 6"):
        adapt(lambda x, t: x, DIT)(torch.randn(2, 3, 4, 4), 0.5)
    with pytest.raises(ValueError, match=r"x \(2, 3\) and t \(3,\) do not fit"):
        adapt(lambda x, t: x, "sd3")(torch.randn(2, 3), torch.rand(3))
