"""Accuracy control: what goes back, why, and when it stops."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import quantize_within, restore
from effformer.compress.quant.control import Goal, control
from torch import Tensor, nn

import effformer


def goal(max_drop: float = 0.1, **options: Any) -> Goal:
    return Goal(
        **{"reference": 1.0, "max_drop": max_drop, "relative": False, "best": "high", **options}
    )


def losing(**lost: float) -> Any:
    """A metric that every quantized unit makes smaller."""
    return lambda back: 1.0 - sum(v for name, v in lost.items() if name not in back)


def test_the_worst_units_go_back_first_and_no_more_than_needed() -> None:
    measure = losing(a=0.05, b=0.3, c=0.02, d=0.2)
    found = control("abcd", measure, goal())
    assert [one.name for one in found.back] == ["b", "d"]
    assert found.drop == pytest.approx(0.07)
    assert [one.gain for one in found.back] == pytest.approx([0.3, 0.2])
    assert [len(t.back) for t in found.log] == [0, 1, 1, 1, 1, 2]
    assert "put back b: alone it regains 0.3" in str(found)
    none = control("abcd", measure, goal(0.6))
    assert none.back == ()
    assert len(none.log) == 1
    every = control("abcd", measure, goal(0.0))
    assert len(every.back) == 4
    assert every.drop == 0


def test_units_that_bring_nothing_are_quantized_again_and_the_rest_is_ranked_anew() -> None:
    """Once a is back, b and c bring nothing, and d, of which nobody saw it before, is what is missing."""

    def measure(back: Collection[str]) -> float:
        base = {0: 0.5, 1: 0.5}["d" in back and "a" in back]
        gain = 0.2 * ("a" in back) + 0.29 * ("a" in back and "d" in back)
        return base + gain + (0.1 * ("b" in back) + 0.1 * ("c" in back)) * ("a" not in back)

    found = control("abcd", measure, goal())
    assert [one.name for one in found.back] == ["a", "d"]
    assert ("a", "b", "c") in [t.back for t in found.log]


@pytest.mark.parametrize(
    ("options", "metric", "drop"),
    [
        ({}, 0.8, 0.2),
        ({}, 1.5, -0.5),
        ({"best": "low"}, 1.5, 0.5),
        ({"reference": 4.0, "relative": True}, 3.0, 0.25),
        ({"reference": -4.0, "relative": True}, -5.0, 0.25),
        ({"reference": 4.0, "relative": True, "best": "low"}, 5.0, 0.25),
        ({}, math.nan, math.inf),
    ],
    ids=str,
)
def test_drops(options: dict[str, Any], metric: float, drop: float) -> None:
    assert goal(**options).drop(metric) == pytest.approx(drop)


def test_metrics_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="is 0 for the dense model"):
        goal(reference=0.0, relative=True)
    with pytest.raises(ValueError, match="gives nan for the dense model"):
        goal(reference=math.nan)
    model = nn.Sequential(nn.Linear(32, 8))
    for wrong in (None, "1", True, torch.ones(2)):
        with pytest.raises(TypeError, match="metric: expected a number"):
            quantize_within(model, "int8", lambda _, wrong=wrong: wrong)


def test_units_whose_metric_is_no_number_are_put_back_too() -> None:
    found = control("ab", lambda back: 1.0 if {*back} == {"a", "b"} else math.nan, goal())
    assert len(found.back) == 2
    assert found.metric == 1
    json.dumps(found.to_dict(), allow_nan=False)


class Net(nn.Module):
    """A norm with one reader into which smoothing folds, and a tied table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(12, 32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        return self.head(h + self.attn(h, h, h, need_weights=False)[0])


IDS = {"ids": torch.arange(60).reshape(12, 5) % 12}


@pytest.mark.parametrize("scheme", ["int4", "smoothquant", "gptq"])
def test_layers_of_a_model_go_back_and_the_result_loads(scheme: str, tmp_path: Path) -> None:
    model = Net().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(**IDS)

    def distance(tried: nn.Module) -> Tensor:
        assert not tried.training
        assert not torch.is_grad_enabled()
        return (tried(**IDS) - wanted).norm() / wanted.norm()

    _, loose = quantize_within(model, scheme, distance, best="low", max_drop=10.0, data=IDS)
    assert loose.back == ()
    limit = 0.5 * loose.drop
    small, report = quantize_within(
        model, scheme, distance, best="low", max_drop=limit, data=IDS, sensitive=None
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert 0 < report.drop <= limit
    assert 0 < len(report.back) < len(report.units)
    reasons = {kept.name: kept.reason for kept in report.quantized.kept}
    assert all("put back" in reasons[one.name] for one in report.back)
    assert report.quantized.bytes_after < report.quantized.bytes_before
    with torch.no_grad():
        y = small.eval()(**IDS)
        assert float(distance(small)) == pytest.approx(report.metric)
        again = restore(Net(), effformer.save_weights(small, tmp_path / "small.safetensors"))
        assert torch.equal(again.eval()(**IDS), y)


def test_everything_back_is_the_dense_model() -> None:
    model = Net().eval()
    same, report = quantize_within(model, "int4", _whole(model), max_drop=0.0, data=IDS)
    assert len(report.back) == len(report.units)
    assert type(same.attn) is nn.MultiheadAttention
    assert same.head.weight is same.table.weight
    assert not getattr(same, "transforms", ())
    assert {name: sorted(vars(m)) for name, m in same.named_modules()} == {
        name: sorted(vars(m)) for name, m in model.named_modules()
    }
    with torch.no_grad():
        assert_close(same(**IDS), model(**IDS), rtol=0, atol=0)


def _whole(model: nn.Module) -> Any:
    """1 for a model that computes exactly what this one does."""
    with torch.no_grad():
        wanted = model(**IDS)
    return lambda tried: float((tried(**IDS) - wanted).abs().max() < 1e-6)


def test_a_quick_metric_ranks() -> None:
    model, ranked, measured = Net().eval(), [], []
    whole = _whole(model)

    def quick(tried: nn.Module) -> float:
        ranked.append(1)
        return -float(tried(ids=IDS["ids"][:2]).abs().sum())

    def metric(tried: nn.Module) -> float:
        measured.append(1)
        return float(whole(tried))

    _, report = quantize_within(model, "int4", metric, max_drop=0.0, quick=quick)
    assert report.drop == 0
    assert ranked
    assert len(measured) <= 2 + 2 * len(report.units)
