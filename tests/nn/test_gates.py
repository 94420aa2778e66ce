from __future__ import annotations

import pytest
import torch
from torch import nn

from effformer.context import Context, Tap
from effformer.nn.gates import GateLinear, Switch
from effformer.nn.init import truncated_normal_linears, xavier_linears


def test_evaluation_compares_with_the_threshold() -> None:
    logits = torch.tensor([-1.0, 0.0, 1e-3, 2.0])
    assert Switch().eval()(logits).tolist() == [0, 0, 1, 1]
    assert Switch(threshold=0.8).eval()(logits).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("tau", [0.5, 5.0])
def test_probability_is_the_sigmoid_whatever_the_temperature(tau: float) -> None:
    switch = Switch(tau=tau, generator=torch.Generator().manual_seed(0))
    for a in (-1.0, 0.3, 2.0):
        share = float(switch(torch.full((40_000,), a)).mean())
        assert share == pytest.approx(float(torch.tensor(a).sigmoid()), abs=0.01)


def test_values_are_hard_and_gradients_soft() -> None:
    switch = Switch(tau=5.0)
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(50, dtype=torch.float64)
    tap = Tap(edit=lambda place, value: noise, at=("*.noise",))
    values = switch(logits, Context(tap=tap))
    assert set(values.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(values.detach(), (logits + noise > 0).double())
    values.sum().backward()
    soft = torch.sigmoid((logits + noise) / 5.0)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 5.0)


def test_a_generator_repeats_the_samples() -> None:
    logits = torch.zeros(100)
    first, again = (Switch(generator=torch.Generator().manual_seed(7))(logits) for _ in range(2))
    assert torch.equal(first, again)
    assert 0 < first.sum() < 100


def test_gates_keep_their_start_and_their_precision() -> None:
    net = nn.Sequential(nn.Linear(4, 4), GateLinear(4, 3, start=15.0))
    for init in (xavier_linears, truncated_normal_linears):
        init(net)
        assert net[1].bias.tolist() == [15.0] * 3
        assert not net[0].bias.any()
    gate = net[1].to(torch.bfloat16)
    assert gate(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net[1].float()(torch.randn(2, 4)).dtype == torch.float32
