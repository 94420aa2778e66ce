"""Whole models in half precision and under autocast, against float64, and trained in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effformer
from effformer import registry
from effformer.calls import outputs
from effformer.context import Ledger
from effformer.testing.precision import KINDS, assert_near
from effformer.train import Classification, TrainConfig, load_data, read_checkpoint, train

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
NAMES = [n for n in effformer.list_models() if n.endswith(("-nano", "-tiny"))]
FAMILIES = {registry.model.get(n).build: n for n in reversed(NAMES)}


def _awake(name: str) -> nn.Module:
    """A model whose zero gates and biases are off zero."""
    torch.manual_seed(0)
    model = effformer.build_model(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2 or not p.any():
                p.add_(torch.randn_like(p) * 0.05)
    return model


def _call(given: dict[str, Any], kind: str) -> Any:
    """Outputs times x, so that token models have an input with a gradient, too. All precisions are given
    what the lowest can hold: a time of 645.9 is another one in bfloat16, and its features turn.
    """
    held = KINDS[kind][0]

    def call(model: nn.Module, x: Tensor) -> Tensor:
        def low(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [low(one) for one in value]
            real = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(held).to(x.dtype) if real else value

        out = outputs(model(**{key: low(value) for key, value in given.items()}))
        return torch.cat([y.flatten() for y in out if y.is_floating_point()]) * x

    return call


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(n, k, marks=() if k == "bfloat16" else pytest.mark.slow)
        for n in FAMILIES.values()
        for k in KINDS
    ],
)
def test_near_float64(name: str, kind: str) -> None:
    model = _awake(name)
    assert_near(model, torch.ones(1), kind, _call(model.example_inputs(1), kind))


@pytest.mark.parametrize("name", ["lmuformer-tiny", "spiking-lmuformer-tiny", "lmu-sequence-tiny"])
def test_streams_and_statistics_are_sums_in_float32(name: str) -> None:
    model: Any = effformer.build_model(name).to(torch.bfloat16)
    x = model.example_inputs(2)["x"].to(torch.bfloat16)
    statistics = [v for n, v in model.named_buffers() if "running_" in n]
    assert all(v.dtype == torch.float32 for v in statistics)
    before = [v.clone() for v in statistics]
    for _ in range(10):
        model.train()(x)
    if statistics:  # steps of a hundredth of what is left are lost in bfloat16
        whole = effformer.build_model(name)
        whole.load_state_dict(model.state_dict())
        assert not torch.equal(statistics[0], before[0])
        assert not torch.equal(statistics[0], statistics[0].bfloat16().float())
    out, state = model.eval().step(x, model.init_state(2))
    assert out.dtype == torch.bfloat16
    assert state.total.dtype == torch.float32


def _objective(model: nn.Module, batch: Any, *rest: Any) -> Tensor:
    return Classification()(model, {**batch, "x": batch["x"].to(torch.bfloat16)}, *rest)


def test_trains_in_bfloat16_with_averages(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = effformer.build_model(
        "vit-nano", image_size=8, channels=1, patch=4, num_classes=10
    ).bfloat16()
    data = load_data("digits").subset(torch.arange(64))
    first = _objective(model, data.rows(torch.arange(64)), torch.Generator(), Ledger())
    config = TrainConfig(steps=24, batch=16, warmup=2, lr=3e-3, ema=0.9999)
    result = train(model, data, _objective, config, out=tmp_path, log_every=8)
    assert result.loss < 0.9 * first.detach()
    tensors, _ = read_checkpoint(tmp_path)
    name = "blocks.0.attn.part.qkv.weight"
    assert tensors[f"ema.{name}"].dtype == torch.float32
    assert tensors[f"model.{name}"].dtype == torch.bfloat16
    assert model.get_parameter(name).dtype == torch.bfloat16
