"""What a training is measured by while it runs, and that it goes on as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effformer.train import (
    Classification,
    Dataset,
    TrainConfig,
    Validation,
    load_checkpoint,
    load_data,
    read_metrics,
    train,
)

CONFIG = TrainConfig(steps=9, batch=8, warmup=2, lr=1e-2, ema=0.9)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))


def halves() -> tuple[Dataset, Dataset]:
    return load_data("digits").subset(torch.arange(40)).split(0.5)


def test_it_is_the_mean_loss_of_the_held_out_samples() -> None:
    _, held_out = halves()
    model = net().eval()
    expected = nn.functional.cross_entropy(model(held_out["x"]), held_out["y"]).item()
    for batch in (3, 20, 64):
        measured = Validation(data=held_out, objective=Classification(), batch=batch)
        assert measured(model, 0)["val_loss"] == pytest.approx(expected, rel=1e-5)
    few = Validation(data=held_out, objective=Classification(), most=5)(model, 0)["val_loss"]
    own = nn.functional.cross_entropy(model(held_out["x"][:5]), held_out["y"][:5]).item()
    assert few == pytest.approx(own, rel=1e-5)


def test_of_a_classifier_it_is_the_accuracy_as_well() -> None:
    _, held_out = halves()
    model = net().eval()
    right = (model(held_out["x"]).argmax(1) == held_out["y"]).double().mean().item()
    measured = Validation(data=held_out, objective=Classification(), batch=3)(model, 0)
    assert measured["val_accuracy"] == pytest.approx(right)
    few = Validation(data=held_out, objective=Classification(), most=1)(model, 0)["val_accuracy"]
    assert few in (0.0, 1.0)
    half = Validation(data=held_out, objective=Classification())(model.bfloat16(), 0)
    assert set(half) == {"val_loss", "val_accuracy"}


def test_it_sees_the_averaged_weights_and_changes_nothing(tmp_path: Path) -> None:
    data, held_out = halves()
    models = [net(), net()]
    seen: dict[int, Tensor] = {}

    def look(model: nn.Module, step: int) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(7)  # another state of torch's generator
        seen[step] = model.get_parameter("1.weight").clone()
        return Validation(data=held_out, objective=Classification())(model, step)

    train(models[0], data, Classification(), CONFIG, out=tmp_path / "plain")
    train(
        models[1], data, Classification(), CONFIG, out=tmp_path / "watched", evaluate=look,
        evaluate_every=4,
    )  # fmt: skip
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    raw = [net(), net()]
    for model, name in zip(raw, ("plain", "watched"), strict=True):
        load_checkpoint(tmp_path / name, model, "raw")
    assert torch.equal(raw[0][1].weight, raw[1][1].weight)  # type: ignore[arg-type]
    assert list(seen) == [4, 8, 9]
    assert torch.equal(seen[9], models[1].get_parameter("1.weight"))  # the average
    assert not torch.equal(seen[9], raw[1].get_parameter("1.weight"))
    recorded = {
        r["step"]: r["val_loss"] for r in read_metrics(tmp_path / "watched") if "val_loss" in r
    }
    assert list(recorded) == [4, 8, 9]


def test_what_fails_leaves_the_raw_weights() -> None:
    data, _ = halves()
    model = net()

    def broken(model: nn.Module, step: int) -> dict[str, float]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        train(model, data, Classification(), CONFIG, evaluate=broken, evaluate_every=3)
    other = net()
    train(other, data, Classification(), CONFIG.replace(ema=None, steps=9), evaluate_every=3)
    assert model.training


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (3.5, TypeError, "numbers by name"),
        ({"a": "x"}, TypeError, "numbers by name"),
        ({"a": torch.zeros(3)}, TypeError, "numbers by name"),
        ({"loss": 5.0}, ValueError, "val_loss"),
        ({"step": 5}, ValueError, "which the training records itself"),
    ],
)
def test_answers_that_are_none_cost_no_steps(
    tmp_path: Path, answer: Any, error: type[Exception], words: str
) -> None:
    data, _ = halves()
    with pytest.raises(error, match=words):
        train(
            net(), data, Classification(), CONFIG, out=tmp_path, evaluate=lambda model, step: answer,
            evaluate_every=4,
        )  # fmt: skip
    done = train(net(), data, Classification(), CONFIG, out=tmp_path, resume=True, evaluate=print)
    assert (done.resumed, done.steps) == (4, 9)


def test_options() -> None:
    data, held_out = halves()
    with pytest.raises(ValueError, match="evaluate_every must be at least 1, got 0"):
        train(net(), data, Classification(), CONFIG, evaluate_every=0)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        Validation(data=held_out, objective=Classification(), batch=0)
    with pytest.raises(TypeError, match="data"):
        Validation(data=[1], objective=Classification())  # type: ignore[arg-type]
