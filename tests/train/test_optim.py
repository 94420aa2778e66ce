from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effformer
from effformer.context import Ledger
from effformer.train import Batch, Classification, TrainConfig, load_data, read_checkpoint, train
from effformer.train.optim import adamw, learning_rate, optimizer_tensors, restore_optimizer

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


def test_runs_learn_under_autocast() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 10))
    with torch.autocast("cpu", torch.bfloat16):
        result = train(net, load_data("digits"), Classification(), STEPS)
    assert result.loss < 1.0  # 2.3 knows nothing
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def pull(model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger) -> Tensor:
    """A gradient of 1 at every weight."""
    return sum((p.float().sum() for p in model.parameters()), torch.zeros(()))


def run(net: nn.Module, **options: Any) -> dict[str, Tensor]:
    out = options.pop("out", None)
    config = TrainConfig(schedule="constant", warmup=0, lr=1e-3, ema=None, batch=4, **options)
    train(net, load_data("digits"), pull, config, out=out, save_every=7, resume=out is not None)
    return {key: value.detach() for key, value in net.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_steps_of_half_precision_weights_add_up(dtype: torch.dtype, tmp_path: Path) -> None:
    """bfloat16 does not hold 4 - 0.001, nor averages of squares that change by a thousandth."""
    nets = [nn.Linear(3, 2).requires_grad_() for _ in range(2)]
    for net in nets:
        nn.init.constant_(net.weight, 4.0)
        nn.init.constant_(net.bias, 0.0)
    half, exact = run(nets[0].to(dtype), steps=50, out=tmp_path), run(nets[1], steps=50)
    assert float(exact["weight"][0, 0]) == pytest.approx(3.95, abs=1e-4)
    for name, value in half.items():
        assert value.dtype == dtype
        assert torch.equal(value, exact[name].to(dtype))
    tensors, _ = read_checkpoint(tmp_path)
    torch.testing.assert_close(tensors["optimizer.weight.master"], exact["weight"])
    assert {x.dtype for k, x in tensors.items() if k.startswith("optimizer.")} == {torch.float32}


def test_gradients_of_half_precision_weights_add_up() -> None:
    net = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = adamw(net, weight_decay=0.0, betas=(0.9, 0.999))
    for gradient in (256.0, 1.0, 1.0):
        net.weight.grad = torch.full_like(net.weight, gradient)
        optimizer.collect()
    master = optimizer.stepped(net.weight)
    assert master.grad is not None
    assert float(master.grad) == 258.0  # bfloat16: 256


def test_a_run_in_half_precision_resumes_exactly(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2)).bfloat16()
    start = copy.deepcopy(net.state_dict())
    whole = run(net, steps=20, out=tmp_path / "whole")
    found, _ = read_checkpoint(tmp_path / "whole")
    for file in (tmp_path / "whole" / "checkpoints").glob("*20.safetensors"):
        file.unlink()
    again = nn.Sequential(nn.Linear(3, 2)).bfloat16()
    assert not torch.equal(again[0].weight, start["0.weight"])
    resumed = run(again, steps=20, out=tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    assert same(read_checkpoint(tmp_path / "whole")[0], found)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_half_precision_run_of_an_earlier_version_goes_on() -> None:
    """It has no copies, and moments in half precision."""
    net = nn.Linear(2, 2).bfloat16()
    optimizer = adamw(net, weight_decay=0.0, betas=(0.9, 0.999))
    net(torch.ones(1, 2).bfloat16()).sum().backward()
    optimizer.collect()
    optimizer.step()
    found = optimizer_tensors(optimizer, net)
    other = adamw(net, weight_decay=0.0, betas=(0.9, 0.999))
    restore_optimizer(other, net, {k: v.bfloat16() if v.dim() else v for k, v in found.items()})
    again = optimizer_tensors(other, net)
    assert {k: v.dtype for k, v in again.items()} == {k: v.dtype for k, v in found.items()}
