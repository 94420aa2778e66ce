"""What a model is trained for follows from what it is: flows draw, classifiers tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effformer import load_model
from effformer.train import read_metrics, read_run

from .running import answer, invoke, refusal

FEW = ("--set", "depth=1", "--batch", "8", "--steps", "4", "--warmup", "0", "--threads", "1")


def test_a_classifier_is_trained_and_evaluated_on_what_it_has_not_seen(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (
        "train",
        "vit-nano",
        *FEW,
        "--set",
        "patch=4",
        "--evaluate-every",
        "2",
        "--save-every",
        "2",
    )
    done = answer(*words, "--loss", "cross-entropy:smoothing=0.1", "-o", str(run))
    shares = [r["val_accuracy"] for r in read_metrics(run) if "val_accuracy" in r]
    assert len(shares) == 2
    assert done["val_accuracy"] == shares[-1]
    assert "Accuracy" in (run / "report.html").read_text(encoding="utf-8")
    assert read_run(run)["objective"] == {"class": "Classification", "smoothing": 0.1}
    judged = answer("evaluate", str(run))
    assert judged["samples"] == 180
    assert judged["accuracy"] == shares[-1]
    assert "held out" in judged["how"]
    assert answer("evaluate", str(run), "--part", "train")["samples"] == 1797
    (run / "model").rename(tmp_path / "model")
    assert answer("train", "--resume", str(run))["resumed"] == 4
    again, first = (load_model(p).state_dict() for p in (run / "model", tmp_path / "model"))
    assert all(torch.equal(again[name], x) for name, x in first.items())


def test_without_validation_a_classifier_says_no_accuracy(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = invoke("train", "vit-nano", *FEW, "--validation", "0", "--shift", "1", "-o", str(run))
    assert "right" not in done.stdout
    assert "effformer evaluate" in done.stdout
    assert "train part of digits" in answer("evaluate", str(run))["how"]


@pytest.mark.parametrize("model", ["vit-nano", "sit-nano"])
def test_bfloat16_weights_are_trained_kept_and_resumed(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--validation", "0.1", "--save-every", "2", "-o", str(run))
    invoke("train", model, *FEW, *words, "--dtype", "bfloat16")
    saved = load_model(run / "model")
    assert {p.dtype for p in saved.parameters()} == {torch.bfloat16}
    assert answer("train", "--resume", str(run))["resumed"] == 4
    assert "parameters" in refusal("train", "--resume", str(run), "--dtype", "float32")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--loss", "flow-matching"], "--loss flow-matching is for models that draw them"),
        (["--label-drop", "0.2"], "--label-drop is for models that draw them"),
        (["--loss", "cross-entropy:smooth=1"], "did you mean 'smoothing'"),
        (["--loss", "cross-entropy:smoothing=2"], "smoothing must lie in [0, 1)"),
        (["--dtype", "float16"], "--dtype bfloat16 has the range of float32"),
    ],
)
def test_options_of_the_other_kind(words: list[str], said: str, tmp_path: Path) -> None:
    assert said in refusal("train", "vit-nano", *words, "-o", str(tmp_path / "run"))


def test_models_of_other_things_are_refused(tmp_path: Path) -> None:
    said = refusal("train", "bert-tiny", "-o", str(tmp_path / "run"))
    assert "bert-tiny neither draws images of classes nor tells them" in said
