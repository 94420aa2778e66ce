"""From dense to adaptive: what is copied, what each phase trains, and on what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import (
    AdaptiveScheme,
    Budgeted,
    GatePretraining,
    LearnerDistillation,
    acmize,
    quantize,
)
from effformer.compress.dynamic.adaptive_losses import distillation_loss, gate_labels, used_budget
from torch import Tensor, nn

import effformer
from effformer.checks import CapabilityError
from effformer.context import Ledger, Tap
from effformer.train import Batch, Classification, Generation, TrainConfig, load_data, train

K = 4


def teacher(name: str = "vit-nano", **options: Any) -> Any:
    model = effformer.build_model(name, **options).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def batch(model: Any) -> Batch:
    x = model.example_inputs(4)["x"]
    return Batch(x=x, y=torch.arange(4))


def loss_of(objective: Any, student: nn.Module, data: Batch) -> Tensor:
    return objective(student, data, torch.Generator().manual_seed(0), Ledger())


def split(mlp: Any, learners: Any) -> None:
    """Make the learners the teacher's FFN, cut into K pieces."""
    with torch.no_grad():
        mlp.fc2.bias.zero_()
        for i, rows in enumerate(torch.arange(mlp.hidden).chunk(K)):
            learners.fc1[i].weight.copy_(mlp.fc1.weight[rows])
            learners.fc1[i].bias.copy_(mlp.fc1.bias[rows])
            learners.fc2[i].weight.copy_(mlp.fc2.weight[:, rows])


def test_everything_else_is_copied() -> None:
    dense = teacher()
    student, report = acmize(dense)
    mine, theirs = dense.state_dict(), student.state_dict()
    shared = mine.keys() & theirs.keys()
    assert report.copied == len(shared)
    assert all(torch.equal(mine[k], theirs[k]) for k in shared)
    new = theirs.keys() - shared
    assert all(any(k.startswith(place) for place in report.places) for k in new)
    assert len(report.places) == 2 * 5
    assert report.params_before == sum(p.numel() for p in dense.parameters())
    assert report.params_after == sum(p.numel() for p in student.parameters())
    assert type(student)(student.config).config == student.config
    assert not student.training


def test_sizes_follow_the_scheme() -> None:
    small, _ = acmize(teacher(), AdaptiveScheme(size=0.5, projections=False, learners=3))
    ffn = small.blocks[0].ffn.part
    assert ffn.config.learners == 3
    assert ffn.learners.width == round(0.5 * 4 * 48 / 3)
    assert isinstance(small.blocks[0].attn.part.qkv, nn.Linear)


def test_blocks_of_their_own_kind_and_those_that_where_covers() -> None:
    dense = teacher(layers={"0": {"ffn": {"name": "mlp", "hidden": 64}}})
    student, report = acmize(dense, {"projections": False})
    assert [student.config.at(f"blocks.{i}.ffn.hidden") for i in (0, 1)] == [64, 4 * 48]
    other, report = acmize(dense, where=("blocks.0.attn", "blocks.1.ffn"))
    assert {place.rpartition(".")[0] for place in report.places} == {
        "blocks.0.attn.part",
        "blocks.1.ffn.part",
    }
    again, _ = acmize(other, {"projections": False}, "blocks.0")  # one after the other
    assert again.config.at("blocks.0.attn.projections") == other.config.at(
        "blocks.0.attn.projections"
    )
    assert again(dense.example_inputs()["x"]).isfinite().all()


def test_a_student_cut_from_the_teacher_has_nothing_left_to_learn() -> None:
    dense = teacher()
    student, _ = acmize(dense, AdaptiveScheme(projections=False))
    for mine, theirs in zip(student.blocks, dense.blocks, strict=True):
        split(theirs.ffn.part, mine.ffn.part.learners)
    data = batch(dense)
    full = type(dense)(student.config.replace(ffn={"fixed": K})).eval()
    full.load_state_dict(student.state_dict())
    torch.testing.assert_close(full(data["x"]), dense(data["x"]), rtol=1e-4, atol=1e-5)
    tap = Tap(keep=("blocks.*.ffn",))
    dense(data["x"], tap=tap)
    zero = torch.stack([y.square().mean() for y in tap.seen.values()]).mean()
    loss = loss_of(LearnerDistillation(teacher=dense, task=Classification()), student, data)
    assert 0 < loss < zero  # of K + 1 errors the last is 0, the first is the output itself


@pytest.mark.parametrize("name", ["vit-nano", "dit-nano"])
@pytest.mark.parametrize("detach", [True, False])
def test_distillation_is_module_by_module_on_the_teachers_activations(
    name: str, detach: bool
) -> None:
    dense = teacher(name, **({} if name == "vit-nano" else {"learn_sigma": False}))
    student, report = acmize(dense)
    task: Any = Classification() if name == "vit-nano" else Generation(label_drop=0.0)
    data = batch(dense)
    objective = LearnerDistillation(teacher=dense, task=task, detach=detach)
    loss = loss_of(objective, student, data)
    loss.backward()
    learned = {n for n, p in student.named_parameters() if p.grad is not None}
    assert all(any(n.startswith(place) for place in report.places) for n in learned)
    assert not any(".gate." in n for n in learned)
    assert all(p.grad is None for p in dense.parameters())
    # by hand, for one FFN and for the keys of one attention
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for place in ("blocks.1.ffn.part", "blocks.0.attn.part.qkv"):
        dense.get_submodule(place).register_forward_hook(
            lambda _, args, out, place=place: seen.__setitem__(place, (args[0], out))
        )
    with torch.no_grad():
        task(dense, data, torch.Generator().manual_seed(0), Ledger())
    pairs = {
        "blocks.1.ffn.part.learners": seen["blocks.1.ffn.part"],
        "blocks.0.attn.part.k": (
            seen["blocks.0.attn.part.qkv"][0], seen["blocks.0.attn.part.qkv"][1][..., 48:96],
        ),
    }  # fmt: skip
    for place, (x, y) in pairs.items():
        learners: Any = student.get_submodule(place)
        weight = learners.fc1[0].weight
        expected = distillation_loss(learners, x, y, detach=detach) / len(report.places)
        torch.testing.assert_close(torch.autograd.grad(expected, weight)[0], weight.grad)


@pytest.mark.parametrize("name", [pytest.param("vit-nano", marks=pytest.mark.slow), "sit-nano"])
def test_three_stages_in_one_call_are_those_by_hand(name: str, tmp_path: Path) -> None:
    size = "image_size" if name == "vit-nano" else "input_size"
    dense = teacher(name, depth=1, channels=1, patch=4, num_classes=10, **{size: 8})
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    scheme = {
        "projections": name == "sit-nano",
        "steps": [3, 2, 3],
        "lr": [1e-2, 1e-2, 3e-3],
        "batch": 8,
    }
    task: Any = Classification() if name == "vit-nano" else Generation()
    data = load_data("digits").subset(torch.arange(32))
    student, report = acmize(dense, scheme, data=data, objective=task, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    hand, nothing = acmize(dense, scheme)
    assert nothing.executed is None
    assert "data= trains them" in str(nothing)
    objectives = (
        LearnerDistillation(teacher=dense, task=task), GatePretraining(teacher=dense, task=task),
        Budgeted(task=task, target=0.5, budget=1.0),
    )  # fmt: skip
    wanted = {key: p.requires_grad for key, p in hand.named_parameters()}
    for stage, objective in enumerate(objectives):
        for key, p in hand.named_parameters():
            inside = any(key.startswith(f"{place}.") for place in report.places)
            learns = stage == 2 or (inside and (".gate." in key) == (stage == 1))
            p.requires_grad_(wanted[key] and learns)
        config = AdaptiveScheme.from_dict(scheme).training(stage)
        train(hand, data, objective, config, progress=False)
    for mine, theirs in zip(student.parameters(), hand.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.requires_grad == theirs.requires_grad
    assert not student.training
    assert len(report.errors) == len(report.places)
    assert report.executed is not None
    again: Any = effformer.load_model(effformer.save_pretrained(student, tmp_path / "m"))
    inputs = dense.example_inputs(2)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs), student(**inputs))


@pytest.mark.slow
def test_the_budget_is_reached_and_learners_stand_for_what_they_replaced() -> None:
    dense = teacher(depth=1, channels=1, image_size=8, patch=4, num_classes=10)
    data = load_data("digits")
    train(dense, data, Classification(), TrainConfig(steps=200, batch=32, ema=None), progress=False)
    scheme = {
        "projections": False, "steps": [300, 100, 300], "lr": [3e-3, 1e-2, 1e-3], "batch": 32,
        "budget": 5.0,
    }  # fmt: skip
    for task in (Classification(), None):
        _, report = acmize(dense, scheme, data=data, objective=task, progress=False)
        assert max(report.errors) < 0.5
        assert report.executed == pytest.approx(0.5, abs=0.25)


def test_a_stage_that_was_stopped_goes_on(tmp_path: Path) -> None:
    dense = teacher(depth=1, channels=1, image_size=8, patch=4, num_classes=10)

    class Stopping(Classification):
        calls = 0

        def __call__(self, *args: Any) -> Tensor:
            Stopping.calls += 1
            if Stopping.calls == 14:  # one for each step of the first two stages, and in the third
                raise KeyboardInterrupt
            return super().__call__(*args)

    Stopping.__qualname__ = "Classification"  # the same run
    scheme = {"steps": [4, 4, 4], "batch": 8, "projections": False}
    given: dict[str, Any] = {
        "data": load_data("digits").subset(torch.arange(32)),
        "progress": False,
    }
    whole, _ = acmize(dense, scheme, objective=Classification(), **given)
    with pytest.raises(KeyboardInterrupt):
        acmize(dense, scheme, objective=Stopping(), out=tmp_path, **given)
    assert {p.name for p in tmp_path.iterdir()} >= {"learners", "gates"}
    resumed, _ = acmize(dense, scheme, objective=Classification(), out=tmp_path, **given)
    assert all(
        torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match=str(tmp_path)):
        acmize(dense, scheme | {"target": 0.3}, objective=Classification(), out=tmp_path, **given)


def test_gates_alone_learn_from_the_labels() -> None:
    dense = teacher()
    student, _ = acmize(dense)
    objective = GatePretraining(teacher=dense, task=Classification())
    loss_of(objective, student, batch(dense)).backward()
    learned = {n for n, p in student.named_parameters() if p.grad is not None}
    assert learned == {n for n, _ in student.named_parameters() if ".gate." in n}


def test_a_taught_gate_gives_the_labels() -> None:
    torch.manual_seed(0)
    dense = teacher(depth=1)
    student, _ = acmize(dense, AdaptiveScheme(projections=False))
    learners = student.blocks[0].ffn.part.learners
    seen: list[tuple[Tensor, Tensor]] = []
    hook = dense.blocks[0].ffn.part.register_forward_hook(
        lambda _, args, out: seen.append((args[0].detach(), out.detach()))
    )
    data = batch(dense)
    dense(data["x"])
    hook.remove()
    x, y = seen[0]
    with torch.no_grad():
        learners.fc2[1].weight.zero_()  # the second learner is of no use: every label is 2 or 4
        labels = gate_labels((learners.every(x) - y.unsqueeze(-2)).norm(dim=-1))
    objective = GatePretraining(teacher=dense, task=Classification())
    adam = torch.optim.Adam(learners.gate.parameters(), lr=1e-2)
    for _ in range(60):
        adam.zero_grad()
        loss_of(objective, student, data).backward()
        adam.step()
    right = (learners.eval().gate(x).argmax(-1) == labels).float().mean()
    assert right > 0.9


@pytest.mark.slow
def test_the_budget_is_met_by_training() -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    dense = teacher()
    student, _ = acmize(dense)
    config = TrainConfig(steps=120, batch=32, lr=3e-3, warmup=0, ema=None)
    train(student, data, Budgeted(task=Classification(), target=0.4, budget=5.0), config)
    ledger = Ledger()
    student.train()(data["x"][:200], ledger=ledger)  # evaluation does not sample its choices
    assert used_budget(ledger.choices).item() == pytest.approx(0.4, abs=0.05)


def test_bad_input() -> None:
    dense = teacher()
    student, _ = acmize(dense)
    with pytest.raises(CapabilityError, match="'acm' is not a plain FFN; give ffn=False"):
        acmize(student)
    with pytest.raises(CapabilityError, match="no plain projections; give projections=False"):
        acmize(student, AdaptiveScheme(ffn=False))
    with pytest.raises(CapabilityError, match="not a stack of equally wide blocks; such are the"):
        acmize(nn.Linear(3, 3))
    with pytest.raises(CapabilityError, match="acmize first, then quantize"):
        acmize(quantize(dense, "int8")[0])
    with pytest.raises(ValueError, match=r"where='blocks\.9' matches no module"):
        acmize(dense, where="blocks.9")
    with pytest.raises(CapabilityError, match="never called its model"):
        acmize(dense, data=batch(dense), objective=lambda *_: torch.zeros(()), progress=False)
    with pytest.raises(ValueError, match="nothing to replace"):
        AdaptiveScheme(ffn=False, projections=False)
    with pytest.raises(ValueError, match="learners must be at least 1"):
        AdaptiveScheme(learners=0)
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\], got 0"):
        Budgeted(task=Classification(), target=0.0)
    with pytest.raises(CapabilityError, match="no gate reported to the ledger"):
        loss_of(Budgeted(task=Classification(), target=0.5), dense, batch(dense))
    with pytest.raises(CapabilityError, match="the student has no learners"):
        loss_of(LearnerDistillation(teacher=dense, task=Classification()), dense, batch(dense))
