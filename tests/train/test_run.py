"""The model of a run, finished or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import effformer
from effformer.checks import FormatError
from effformer.train import Classification, Generation, TrainConfig, load_data, load_run, train

CONFIG = TrainConfig(steps=4, batch=4, warmup=0, ema=0.5)
SMALL = {"input_size": 8, "channels": 1, "num_classes": 10, "learn_sigma": False, "patch": 4}


@pytest.mark.parametrize("ema", [0.5, None])
def test_an_unfinished_run_has_a_model(tmp_path: Path, ema: float | None) -> None:
    data = load_data("digits").subset(torch.arange(20))
    model = effformer.build_model("sit-nano", attn="flow", **SMALL)
    train(model, data, Generation(), CONFIG.replace(ema=ema), out=tmp_path / "run")
    loaded, step = load_run(tmp_path / "run")
    assert (step, loaded.training, loaded.name) == (None, False, "sit-nano")  # all steps are done
    assert loaded.config == model.config
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    assert loaded.trained == model.trained
    with torch.no_grad():
        model.final.linear.weight.fill_(3.0)
    effformer.save_pretrained(model, tmp_path / "run" / "model")
    finished, step = load_run(tmp_path / "run")
    assert step is None
    assert finished.get_parameter("final.linear.weight").eq(3).all()


def test_a_run_under_autocast_goes_on_under_autocast(tmp_path: Path) -> None:
    data = load_data("digits").subset(torch.arange(20))

    def run(**options: bool) -> None:
        model = effformer.build_model("sit-nano", **SMALL)
        train(model, data, Generation(), CONFIG, out=tmp_path / "run", **options)

    run()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"autocast was None and is 'torch\.bfloat16'"),
    ):
        run(resume=True)


def test_half_weights_learn_from_ordinary_data() -> None:
    model = effformer.build_model("sit-nano", **SMALL).bfloat16()
    result = train(model, load_data("digits"), Generation(), CONFIG)
    assert result.loss > 0
    assert model.final.linear.weight.dtype == torch.bfloat16


def test_runs_without_a_model_of_ours_say_what_to_do(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    train(net, load_data("digits"), Classification(), CONFIG, out=tmp_path / "run")
    with pytest.raises(FormatError, match=r"does not say which model.*load_checkpoint"):
        load_run(tmp_path / "run")
    with pytest.raises(FormatError, match="holds no training run"):
        load_run(tmp_path)
