from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import effformer
from effformer.train import Classification, TrainConfig, load_data, train
from effformer.train.optim import adamw, learning_rate

STEPS = TrainConfig(steps=60, warmup=0, lr=1e-2, ema=None)


def test_only_weights_of_maps_decay() -> None:
    model = effformer.build_model("dit-nano", positions="learned")
    optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.999))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert {"blocks.0.attn.part.qkv.weight", "patch_embed.proj.weight"} <= decayed
    assert {"blocks.0.attn.part.qkv.bias", "label_embed.table.weight", "pos_embed"} <= plain
    assert decayed | plain == set(names.values())
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]


def test_norm_weights_do_not_decay() -> None:
    optimizer = adamw(nn.LayerNorm(4), weight_decay=0.1, betas=(0.9, 0.999))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0]


@pytest.mark.parametrize(("name", "kept"), [
    ("gated-delta", {"rate", "bias"}), ("kda", {"rate", "bias"}), ("ssd", {"rate", "bias", "skip"}),
])  # fmt: skip
def test_rates_of_forgetting_do_not_decay(name: str, kept: set[str]) -> None:
    model = effformer.build_model("dit-nano", attn=name, depth=1)
    optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.999))
    names = {id(p): n for n, p in model.named_parameters()}
    plain = {names[id(p)] for p in optimizer.param_groups[1]["params"]}
    assert {f"blocks.0.attn.part.core.{n}" for n in kept} <= plain
    assert "blocks.0.attn.part.output.weight" in plain


def test_learning_rate() -> None:
    def rates(cosine: bool) -> list[float]:
        return [learning_rate(s, peak=2.0, warmup=4, steps=10, cosine=cosine) for s in range(10)]

    assert rates(False) == [0.5, 1.0, 1.5, 2.0] + 6 * [2.0]
    assert rates(True)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates(True)[7] == pytest.approx(1.0)
    assert rates(True)[9] == pytest.approx(1 + math.cos(math.pi * 5 / 6))
    assert learning_rate(9, peak=2.0, warmup=10, steps=10, cosine=True) == 2.0


def test_fused_is_exact() -> None:
    """The fused kernel agrees with the formula."""
    layer = nn.Linear(3, 2)
    w, g = layer.weight.detach().double().clone(), torch.randn(2, 3)
    optimizer = adamw(layer, weight_decay=0.1, betas=(0.9, 0.99))
    layer.weight.grad = g.clone()
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    expected = w * (1 - 0.001) - 0.01 * g.double() / (g.double().abs() + 1e-8)
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_trained_in_float32(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 10)).to(dtype)
    options = {"weight_decay": 0.0, "betas": (0.9, 0.999)}
    with pytest.raises(
        ValueError, match=rf"1\.weight is {str(dtype)[6:]}, in which .* model\.float"
    ):
        adamw(net, **options)  # type: ignore[arg-type]
    net[2].float()
    adamw(net.requires_grad_(False)[2].requires_grad_(), **options)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype):
        result = train(net.float().requires_grad_(), load_data("digits"), Classification(), STEPS)
    assert result.loss < 1.0  # 2.3 knows nothing
    assert {p.dtype for p in net.parameters()} == {torch.float32}
