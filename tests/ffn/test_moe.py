"""Mixture of experts: routing, groups, balance, work, official keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.export import Session, export_onnx
from effformer.models.layouts.triposg import MOE
from torch import nn

import effformer
from effformer.context import Context, Ledger
from effformer.ffn import MLP, MoE
from effformer.ffn.moe import balance_loss
from effformer.profile import profile
from effformer.site import Site

DIM = 12


def make(**options: Any) -> MoE:
    config = MoE.Config.from_dict({"hidden": 10, "experts": 5, **options})
    part = MoE(config, Site(dim=DIM, path="here")).eval()
    for p in part.parameters():
        nn.init.normal_(p, std=0.5)
    return part


@pytest.mark.slow
@torch.no_grad()
def test_graphs_gather_the_tokens_of_each_expert(tmp_path: Path) -> None:
    """Weights of an expert that nobody chose are read by nobody."""
    part, x, path = make(), torch.randn(3, 7, DIM), tmp_path / "m.onnx"
    part.router.weight[4] = 0
    x = x.abs()
    part.router.weight[:4] = part.router.weight[:4].abs()
    expected = part(x)
    for p in part.experts[4].parameters():
        p.fill_(torch.nan)
    report = export_onnx(part, path, {"x": x}, verify=False)
    assert report.graph.operators["NonZero"] == 5
    (out,) = Session(path).run({"x": x}).values()
    assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"shared": 0, "top_k": 1}, {"shared": 2, "top_k": 5}])
@pytest.mark.parametrize("renormalise", [False, True])
def test_equation(options: dict[str, Any], renormalise: bool) -> None:
    part, x = make(renormalise=renormalise, **options), torch.randn(2, 7, DIM)
    p = (x @ part.router.weight.T).softmax(-1)
    chosen = p.topk(part.top_k).indices
    for b in range(2):
        for n in range(7):
            one = x[b : b + 1, n : n + 1]
            total = p[b, n, chosen[b, n]].sum() if renormalise else 1.0
            y = sum(part.experts[e](one) * p[b, n, e] / total for e in chosen[b, n].tolist())
            y = y if part.shared is None else y + part.shared(one)
            assert_close(part(one), y, rtol=1e-5, atol=1e-6)
            assert_close(part(x)[b : b + 1, n : n + 1], y, rtol=1e-5, atol=1e-6)


def test_no_tokens() -> None:
    assert make()(torch.randn(2, 0, DIM)).shape == (2, 0, DIM)


@pytest.mark.parametrize("shape", [(2, 9), (1, 1)])
def test_grouped_equals_masked(shape: tuple[int, int]) -> None:
    part, x = make(), torch.randn(*shape, DIM, requires_grad=True)
    _, weights, chosen = part.route(x)
    grouped, masked = part._grouped(x, weights, chosen), part._masked(x, weights, chosen)
    torch.testing.assert_close(grouped, masked)
    cotangent = torch.randn_like(masked)
    wanted = [x, part.router.weight]
    grads = [
        torch.autograd.grad((y * cotangent).sum(), wanted, retain_graph=True)
        for y in (grouped, masked)
    ]
    assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_equal_experts_are_one_ffn() -> None:
    part = make(renormalise=True, shared=0)
    for expert in part.experts[1:]:
        expert.load_state_dict(part.experts[0].state_dict())
    x = torch.randn(2, 7, DIM)
    assert_close(part(x), part.experts[0](x), rtol=1e-5, atol=1e-6)


def test_balance() -> None:
    uniform = torch.full((2, 5, 4), 0.25)
    spread = torch.arange(20).reshape(2, 5, 2) % 4
    assert balance_loss(uniform, spread).item() == pytest.approx(1.0)
    one = torch.tensor([1.0, 0, 0, 0]).expand(2, 5, 4)
    assert balance_loss(one, torch.zeros(2, 5, 1, dtype=torch.int64)).item() == pytest.approx(4.0)


def test_the_ledger_hears_of_balance_and_work() -> None:
    part, x, ledger = make(balance=0.5), torch.randn(3, 7, DIM), Ledger()
    part(x, Context(ledger=ledger))
    probabilities, _, chosen = part.route(x)
    expected = 0.5 * balance_loss(probabilities, chosen)
    torch.testing.assert_close(ledger.losses["here/balance"], expected)
    assert ledger.executed["here"].tolist() == [1.0] * 3
    expected.backward()
    assert part.router.weight.grad is not None
    assert part.router.weight.grad.any()


def test_the_profiler_counts_chosen_experts() -> None:
    model = effformer.build_model("vit-nano", ffn={"name": "moe", "experts": 8})
    part, inputs = model.blocks[0].ffn.part, model.example_inputs(2)
    n = 1 + model.config.grid[0] * model.config.grid[1]
    plain = effformer.build_model("vit-nano")
    more = part.macs(n) - MLP(MLP.Config(), Site(dim=model.config.dim)).macs(n)
    seen = profile(model, inputs)
    assert seen.total == profile(plain, inputs).total + 2 * model.config.depth * more
    assert seen.executed == seen.total


def test_stacked_keys_round_trip() -> None:
    part, other = make(), make()
    stacked = MOE.from_ours(dict(part.state_dict()), part.config)
    assert stacked["w1"].shape == (5, 10, DIM)
    assert stacked["shared_b2"].shape == (DIM,)
    effformer.load_weights(other, stacked, MOE)
    torch.testing.assert_close(dict(other.state_dict()), dict(part.state_dict()))


def test_bad_configs() -> None:
    with pytest.raises(ValueError, match="needs top_k <= experts, got top_k=9, experts=8"):
        MoE.Config(top_k=9)
    with pytest.raises(ValueError, match="shared must be at least 0"):
        MoE.Config(shared=-1)
