"""Distillation: a student that equals its teacher is at the minimum, and training moves it there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effformer.compress import Distillation, cut, prune
from effformer.compress.distill.losses import relation_loss, split_heads
from torch import Tensor

import effformer
from effformer.checks import CapabilityError
from effformer.train import Classification, Generation, TrainConfig, load_data, train

ALL = ("logits", "output", "hidden", {"name": "hidden", "kind": "cosine"}, "attention", {"name": "minilm", "version": 1}, {"name": "minilm", "heads": 4})  # fmt: skip


def valued(objective: Any, student: Any, batch: dict[str, Tensor]) -> Tensor:
    value: Tensor = objective(student, batch, torch.Generator().manual_seed(0), effformer.Ledger())
    return value


@pytest.fixture(scope="module")
def teacher() -> Any:
    torch.manual_seed(0)
    return effformer.build_model("vit-nano", depth=4, num_classes=10).eval()


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_a_copy_is_at_the_minimum(teacher: Any, loss: Any) -> None:
    batch = teacher.example_inputs(2)
    objective = Distillation(teacher=teacher, losses=[loss])
    student = effformer.build_model("vit-nano", depth=4, num_classes=10).eval()
    other = valued(objective, student, batch)
    student.load_state_dict(teacher.state_dict())
    same = valued(objective, student, batch)
    assert abs(float(same.detach())) < 1e-5 < float(other.detach())
    same.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())


def test_students_of_fewer_blocks_heads_and_channels(teacher: Any) -> None:
    batch = teacher.example_inputs(2)
    student = cut(teacher, {"blocks": [0, 2], "width": list(range(32)), "blocks.0.attn.part": [0]})
    value = valued(
        Distillation(teacher=teacher, losses=[{"name": "minilm", "heads": 4}]), student, batch
    )
    assert value > 0
    with pytest.raises(
        CapabilityError, match="'minilm' and 'logits' compare models of other widths"
    ):
        valued(Distillation(teacher=teacher, losses="hidden"), student, batch)
    few = cut(teacher, {"blocks.3.attn.part": [0]})
    with pytest.raises(ValueError, match=r"MiniLM\(version=2"):
        valued(Distillation(teacher=teacher, losses=[{"name": "minilm", "version": 1}]), few, batch)
    with pytest.raises(CapabilityError, match="compares heads one by one"):
        valued(Distillation(teacher=teacher, losses="attention"), few, batch)


def test_layers_follow_the_teacher_evenly(teacher: Any) -> None:
    """Two of four blocks: states 0, 2, 4."""
    short = cut(teacher, {"blocks": [0, 1]})
    with torch.no_grad():
        for block in teacher.blocks[2:]:
            block.attn.part.proj.weight.zero_()
    batch = teacher.example_inputs(2)
    last = valued(
        Distillation(teacher=teacher, losses=[{"name": "hidden", "which": "last"}]), short, batch
    )
    every = valued(Distillation(teacher=teacher, losses=["hidden"]), short, batch)
    assert every > last > 0


def test_padding_never_counts() -> None:
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    s, t = torch.randn(2, 3, 4, 8), torch.randn(2, 2, 4, 12)
    values = []
    for fill in (0.0, 7.0):
        hidden = ~mask[:, None, :, None]
        pair = [split_heads(x.masked_fill(hidden, fill), 6) for x in (s, t)]
        values.append(relation_loss((pair[0], pair[0]), (pair[1], pair[1]), mask))
    torch.testing.assert_close(values[0], values[1])
    with pytest.raises(ValueError, match="do not divide into heads=5"):
        split_heads(s, 5)


def test_training_brings_a_pruned_student_back() -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    model = effformer.build_model(
        "vit-nano", image_size=8, patch=2, channels=1, num_classes=10, dim=32, heads=4
    )
    with torch.no_grad():
        for parameter in model.parameters():  # a teacher with opinions
            parameter.add_(0.2 * torch.randn_like(parameter))
    batch = {"x": data["x"][:256], "y": data["y"][:256]}
    small, _ = prune(model, {"macs": 0.5})
    distance = Distillation(teacher=model)
    before = float(valued(distance, small.eval(), batch).detach())
    losses = ("logits", {"name": "minilm", "heads": 4})
    objective = Distillation(teacher=model, losses=losses, task=Classification(), weight=0.1)
    config = TrainConfig(steps=60, batch=64, lr=3e-3, warmup=5, ema=None)
    train(small, data, objective, config, progress=False)
    after = float(valued(distance, small.eval(), batch).detach())
    assert after < 0.5 * before


def test_generators_meet_the_same_times_and_noise() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "input_size": 8,
        "channels": 1,
        "num_classes": 10,
        "learn_sigma": False,
    }
    model = effformer.build_model("sit-nano", **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = {"x": torch.randn(4, 1, 8, 8), "y": torch.arange(4)}
    objective = Distillation(teacher=model, losses=("output",), task=Generation(), weight=0.0)
    copy = effformer.build_model("sit-nano", **options).eval()
    copy.load_state_dict(model.state_dict())
    assert float(valued(objective, copy, batch).detach()) < 1e-10
    small, _ = prune(model, {"macs": 0.6})
    assert float(valued(objective, small.eval(), batch).detach()) > 1e-8


def test_refusals(teacher: Any) -> None:
    with pytest.raises(ValueError, match="unknown loss 'logit'"):
        Distillation(teacher=teacher, losses=("logit",))
    with pytest.raises(ValueError, match="no losses; choices: logits"):
        Distillation(teacher=teacher, losses=())
    losses = [{"name": "minilm", "block": 9}]
    with pytest.raises(ValueError, match="none of the teacher's 4 blocks"):
        valued(Distillation(teacher=teacher, losses=losses), teacher, teacher.example_inputs(1))
