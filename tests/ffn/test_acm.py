"""Adaptive computation: groups, gates, budgets, losses, conversion of official keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress.dynamic.adaptive_losses import (
    acm_losses,
    budget_loss,
    distillation_loss,
    diversity_loss,
    entropy_loss,
    gate_labels,
    used_budget,
)
from effformer.export import Session, export_onnx
from effformer.models.layouts.acm import ACM_LAYER
from torch import Tensor, nn

import effformer
from effformer.context import Context, Ledger
from effformer.ffn import ACM
from effformer.ledger import Choice
from effformer.profile import profile
from effformer.site import Site

DIM, K = 12, 4


def make(**options: Any) -> ACM:
    config = ACM.Config.from_dict({"hidden": 5 * K, "learners": K, **options})
    part = ACM(config, Site(dim=DIM, path="here")).eval()
    for p in part.parameters():
        nn.init.normal_(p, std=0.5)
    return part


def choose(part: ACM, k: Tensor) -> None:
    """Let the gate choose k."""
    gate = part.learners.gate
    gate.chosen = lambda x: k
    gate.forward = lambda x, noise=None: gate.one_hot(k).to(x)


@pytest.mark.parametrize(
    "k",
    [
        torch.randint(0, K + 1, (3, 7), generator=torch.Generator().manual_seed(0)),
        torch.zeros(1, 5, dtype=torch.int64),
        torch.full((2, 4), 3),
        torch.tensor([[0, 0, 4, 0]]),
        torch.empty(2, 0, dtype=torch.int64),
    ],
    ids=["mixed", "none", "equal", "one", "empty"],
)
@pytest.mark.parametrize("out_bias", [False, True])
def test_grouped_equals_masked_equals_every(k: Tensor, out_bias: bool) -> None:
    part, x = make(out_bias=out_bias), torch.randn(*k.shape, DIM)
    choose(part, k)
    every = part.learners.every(x)
    expected = every.gather(2, k[..., None, None].expand(-1, -1, 1, DIM))[:, :, 0]
    grouped = part(x)
    masked = part.train()(x)
    assert_close(grouped, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masked, expected)


def test_both_executions_have_the_same_gradients() -> None:
    part, x = make(out_bias=True), torch.randn(2, 9, DIM, requires_grad=True)
    k, weight = torch.randint(0, K + 1, (2, 9)), torch.randn(2, 9, DIM)
    choose(part, k)
    wanted = [x, *part.learners.fc1.parameters(), part.learners.zero]
    grouped = torch.autograd.grad((part(x) * weight).sum(), wanted)
    masked = torch.autograd.grad((part.train()(x) * weight).sum(), wanted)
    assert_close(grouped, masked, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_graphs_gather_the_tokens_of_each_learner(tmp_path: Path) -> None:
    part, x, path = make(out_bias=True), torch.randn(3, 7, DIM), tmp_path / "m.onnx"
    report = export_onnx(part, path, {"x": x})
    assert report.parity is not None
    assert report.graph.operators["NonZero"] == K
    gate = part.learners.gate.net[-1]
    gate.weight.zero_()
    gate.bias.copy_(torch.arange(K + 1) == 2)  # all choose two
    expected = part(x)
    for p in (*part.learners.fc1[2:].parameters(), *part.learners.fc2[2:].parameters()):
        p.fill_(torch.nan)
    export_onnx(part, path, {"x": x}, verify=False, force=True)
    (out,) = Session(path).run({"x": x}).values()
    assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-5)


def test_steps_are_the_learners() -> None:
    part, x = make(out_bias=True), torch.randn(2, 5, DIM)
    every = part.learners.every(x)
    torch.testing.assert_close(every[:, :, 0], part.learners.zero.expand_as(x))
    for i in range(1, K + 1):
        torch.testing.assert_close(
            every[:, :, i] - every[:, :, i - 1], part.learners.learner(i, x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("fixed", [0, 2, K])
def test_fixed_runs_so_many(fixed: int) -> None:
    part, x, ledger = make(fixed=fixed), torch.randn(2, 5, DIM), Ledger()
    out = part(x, Context(ledger=ledger))
    torch.testing.assert_close(out, part.learners.every(x)[:, :, fixed])
    assert ledger.executed["here"].tolist() == [fixed / K] * 2


def test_least_is_never_undercut() -> None:
    part = make(least=2)
    for mode in (True, False):
        choice = part.train(mode).learners.gate(torch.randn(50, 4, DIM))
        assert choice.argmax(-1).min() >= 2
        assert choice.shape == (50, 4, K + 1)


def test_gate_is_hard_forward_and_soft_backward() -> None:
    gate, x = make().learners.gate, torch.randn(3, 6, DIM)
    logits = gate.logits(x).detach().requires_grad_()
    noise, weight = torch.randn_like(logits), torch.randn(3, 6, K + 1)
    soft = gate.soft(logits, noise)
    (expected,) = torch.autograd.grad((soft * weight).sum(), logits)
    gate.logits = lambda x: logits
    hard = gate(x, noise)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(hard.argmax(-1), soft.argmax(-1))
    torch.testing.assert_close(torch.autograd.grad((hard * weight).sum(), logits)[0], expected)


def test_noise_follows_the_generator() -> None:
    gate, x = make().learners.gate.train(), torch.randn(40, 3, DIM)
    draws = []
    for seed in (0, 0, 1):
        gate.generator = torch.Generator().manual_seed(seed)
        draws.append(gate(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(("gradient", "learns"), [("straight-through", True), ("none", False)])
def test_the_task_trains_the_gate(gradient: str, learns: bool) -> None:
    part = make(gate={"gradient": gradient}).train()
    part(torch.randn(2, 9, DIM)).sum().backward()
    grads = [p.grad for p in part.learners.gate.parameters()]
    assert all((g is not None and bool(g.any())) is learns for g in grads)


def test_detached_learners_fit_what_is_left() -> None:
    part, x = make(), torch.randn(2, 5, DIM)
    outputs = part.learners.every(x, detach=True)
    first = part.learners.fc1[0].weight
    (late,) = torch.autograd.grad(outputs[:, :, 2:].sum(), first)
    assert not late.any()
    assert distillation_loss(part.learners, x, x).isfinite()


def test_distillation_makes_more_learners_better() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(DIM, 20), nn.GELU(), nn.Linear(20, DIM))
    student = ACM(ACM.Config(hidden=8 * K), Site(dim=DIM)).learners
    adam = torch.optim.Adam(student.parameters(), lr=1e-2)
    x = torch.randn(1, 256, DIM)
    with torch.no_grad():
        y = teacher(x)
    for _ in range(150):
        adam.zero_grad()
        distillation_loss(student, x, y).backward()
        adam.step()
    errors = (student.every(x) - y.unsqueeze(2)).square().mean(dim=(0, 1, 3))
    assert errors[K] < 0.5 * errors[1] < 0.5 * errors[0]


def gates(*choices: list[list[int]]) -> dict[str, Choice]:
    made = (nn.functional.one_hot(torch.tensor(c), K + 1).float() for c in choices)
    return {f"m{i}": Choice(gate.requires_grad_(), 10.0 * (i + 1)) for i, gate in enumerate(made)}


def test_budget() -> None:
    some = gates([[1, 2], [0, 1]], [[4, 4], [4, 0]])
    assert used_budget(some).item() == pytest.approx((10 * 1 + 20 * 3) / (30 * K))
    loss = budget_loss(some, target=0.9)
    assert loss.item() == pytest.approx(0.9 - 70 / 120)
    loss.backward()
    grad = some["m1"].gate.grad
    assert grad is not None
    assert (grad[..., K] < grad[..., 0]).all()  # a step against it makes more learners likelier
    assert budget_loss(gates([[2, 2], [1, 3]]), target=0.5).item() == 0


@pytest.mark.parametrize("target", [0.0, -0.1, 1.01])
def test_budgets_outside_the_range_are_refused(target: float) -> None:
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\], got"):
        budget_loss(gates([[1]]), target)
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\], got"):
        acm_losses(Ledger(), target)


def test_entropy_and_diversity() -> None:
    assert entropy_loss(gates([[0, 1, 2, 3, 4]])).item() == pytest.approx(-1)
    assert entropy_loss(gates([[2, 2, 2, 2, 2]])).item() == pytest.approx(0)
    assert diversity_loss(gates([[1, 3], [3, 1]])).item() == 0
    assert diversity_loss(gates([[4, 4], [0, 0]])).item() == pytest.approx(-2 * 0.5 * 4 / (K + 1))


def test_labels() -> None:
    errors = torch.tensor([[8.0, 4, 2, 1, 1], [8, 8, 4, 2, 1], [8, 4, 2, 1, 0.5], [8, 4, 4, 2, 1]])
    assert gate_labels(errors).tolist() == [K, K, K, 2]


def test_a_model_reports_and_learns() -> None:
    model = effformer.build_model("vit-nano", ffn={"name": "acm"}).train()
    ledger = Ledger()
    out = model(**model.example_inputs(3), ledger=ledger)
    assert sorted(ledger.executed) == ["blocks.0.ffn", "blocks.1.ffn"]
    acm_losses(ledger, target=0.6)
    assert sorted(ledger.losses) == ["acm/budget", "acm/diversity", "acm/entropy"]
    (out.square().mean() + ledger.total_loss()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_profiler_reports_what_is_executed() -> None:
    torch.manual_seed(0)
    model = effformer.build_model("vit-nano", ffn={"name": "acm"}).eval()
    dense = effformer.build_model("vit-nano").eval()
    inputs, ledger = model.example_inputs(2), Ledger()
    with torch.no_grad():
        model(**inputs, ledger=ledger)
    seen = profile(model, inputs)
    parts = [block.ffn.part for block in model.blocks]
    n = 1 + model.config.grid[0] * model.config.grid[1]
    gate = sum(2 * part.learners.gate.macs(n) for part in parts)
    assert seen.total == profile(dense, inputs).total + gate
    skipped = sum(
        part.macs(n) * (1 - fraction).sum().item()
        for part, fraction in zip(parts, ledger.executed.values(), strict=True)
    )
    assert seen.executed == pytest.approx(seen.total - skipped, abs=1)
    assert seen.executed < seen.total


def test_official_keys_round_trip() -> None:
    part = make(out_bias=True)
    official = ACM_LAYER.from_ours(dict(part.state_dict()), part.config)
    assert official["w1"].shape == (DIM, 5 * K)
    assert official["b2"].shape == ((K + 1) * DIM,)
    other = make(out_bias=True)
    effformer.load_weights(other, official, ACM_LAYER)
    torch.testing.assert_close(dict(other.state_dict()), dict(part.state_dict()))


def test_initial_values_are_bounded_as_published() -> None:
    learners = ACM(ACM.Config(hidden=40 * K, out_bias=True), Site(dim=60)).learners
    bounds = {"fc1.0.weight": 160, "fc1.0.bias": 40, "fc2.0.weight": 60, "zero": 60}
    for name, fan in bounds.items():
        largest = learners.get_parameter(name).abs().max().item()
        assert 0.9 * fan**-0.5 < largest <= fan**-0.5


def test_bad_configs() -> None:
    with pytest.raises(ValueError, match="inner width 50 is not divisible by 4 learners"):
        ACM(ACM.Config(hidden=50), Site(dim=DIM))
    with pytest.raises(ValueError, match="needs least < learners, got least=4"):
        ACM.Config(least=4)
    with pytest.raises(ValueError, match=r"fixed must lie in \[1, 4\], got 0"):
        ACM.Config(least=1, fixed=0)
    with pytest.raises(ValueError, match="tau must be positive"):
        ACM.Config.from_dict({"gate": {"tau": 0.0}})
    with pytest.raises(ValueError, match="unknown option 'dept'"):
        ACM.Config.from_dict({"gate": {"dept": 2}})
