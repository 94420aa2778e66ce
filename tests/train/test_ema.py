from __future__ import annotations

import pytest
import torch
from torch import nn

from effformer.train.ema import EMA, ema_decay


def test_warm_up() -> None:
    assert [ema_decay(0.9999, n) for n in (1, 2, 90)] == [2 / 11, 3 / 12, 91 / 100]
    assert ema_decay(0.5, 10**9) == 0.5


@pytest.mark.parametrize("warmup", [True, False])
def test_equals_the_formula(warmup: bool) -> None:
    weights = torch.randn(30, 4, dtype=torch.float64)
    ema = EMA([weights[0]], decay=0.9, warmup=warmup)
    expected = weights[0]
    for n, step in enumerate(weights[1:], start=1):
        ema.update([step])
        decay = min(0.9, (1 + n) / (10 + n)) if warmup else 0.9
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.shadow["0"], expected)
    assert ema.updates == 29


def test_module_parameters_are_averaged_and_buffers_copied() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, decay=0.5, warmup=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight.add_(1.0)
    model(torch.randn(8, 2))
    ema.update(model)
    torch.testing.assert_close(ema.shadow["0.weight"], before["0.weight"] + 0.5)
    torch.testing.assert_close(ema.shadow["1.running_mean"], model[1].running_mean)
    assert int(ema.shadow["1.num_batches_tracked"]) == 1
    assert not ema.shadow["0.weight"].requires_grad
    other = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema.copy_to(other)
    torch.testing.assert_close(dict(other.state_dict()), dict(ema.shadow))
    assert other[0].weight.requires_grad


def test_names_and_positions() -> None:
    a, b = torch.zeros(2), torch.ones(3)
    assert list(EMA([a, b]).shadow) == ["0", "1"]
    assert list(EMA({"a": a, "b": b}).shadow) == ["a", "b"]
    ema = EMA(iter([a, b]), decay=0.0, warmup=False)
    ema.update([a + 5, b])
    torch.testing.assert_close(ema.shadow["0"], a + 5)
    assert not a.any()


def test_state_goes_on_exactly() -> None:
    weights = torch.randn(20, 4)
    straight = EMA([weights[0]], decay=0.95)
    for step in weights[1:]:
        straight.update([step])
    first = EMA([weights[0]], decay=0.95)
    for step in weights[1:10]:
        first.update([step])
    second = EMA([torch.zeros(4)], decay=0.1, warmup=False)
    second.load_state_dict(first.state_dict())
    for step in weights[10:]:
        second.update([step])
    torch.testing.assert_close(second.shadow, straight.shadow, rtol=0, atol=0)


def test_errors() -> None:
    ema = EMA([torch.zeros(2)])
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        EMA([torch.zeros(2)], decay=1.0)
    with pytest.raises(ValueError, match=r"unexpected \['1'\]"):
        ema.update([torch.zeros(2), torch.zeros(2)])
    with pytest.raises(ValueError, match=r"missing \['0'\]"):
        ema.copy_to({"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="missing updates"):
        ema.load_state_dict({"decay": 0.9, "warmup": True, "shadow": {}})
    state = ema.state_dict()
    state["shadow"] = {"0": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"0 is \(3,\), expected \(2,\)"):
        ema.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_averages_of_half_precision_move(dtype: torch.dtype) -> None:
    """A step of 1e-4 of the difference is below the rounding of every half precision."""
    model = nn.Linear(4, 4).to(dtype)
    ema, start = EMA(model, decay=0.9999, warmup=False), model.weight.detach().double()
    with torch.no_grad():
        model.weight.add_(1.0)
    for _ in range(1000):
        ema.update(model)
    expected = start + (1 - 0.9999**1000) * (model.weight.double() - start)
    torch.testing.assert_close(ema.shadow["weight"].double(), expected, rtol=1e-4, atol=1e-4)
    again = EMA(model, decay=0.5)
    again.load_state_dict(ema.state_dict())
    assert torch.equal(again.shadow["weight"], ema.shadow["weight"])
    ema.copy_to(model)
    assert model.weight.dtype == dtype
    again.load_state_dict({**ema.state_dict(), "shadow": dict(model.named_parameters())})
