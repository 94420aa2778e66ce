"""`train` and `sample`: what they print, go on with, draw and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from effformer.export import run as runner
from PIL import Image

import effformer

from .running import answer, invoke, refusal


def test_train_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["sit-nano", "--set", "patch=4", "--steps", "4", "--batch", "8", "-o", str(run)]
    data = answer("train", *words, "--save-every", "2")
    assert data["steps"] == 4
    assert effformer.load_model(run / "model").config.input_size == 8
    assert "already holds a run" in refusal("train", *words)
    assert answer("train", *words, "--resume")["resumed"] == 4
    assert "lr" in refusal("train", *words, "--resume", "--lr", "0.5")


def test_a_run_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    """Its folder alone says how, shows samples and curves, and samples before it is finished."""
    run, words = (
        tmp_path / "run",
        ["sit-nano", "--set", "patch=4", "--batch", "4", "--attn", "flow"],
    )
    more = ["--steps", "6", "--validation", "0.1", "--shift", "1", "--evaluate-every", "3"]
    done = invoke("train", *words, *more, "--save-every", "3", "-o", str(run))
    assert "1,617 samples 1x8x8 of digits in 10 classes; sit-nano" in done.stderr
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "step-00000003.png", "step-00000006.png",
    ]  # fmt: skip
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "held-out" in page
    assert page.count("data:image/png") == 2
    effformer_model = run / "model"
    shutil.rmtree(effformer_model)
    (run / "checkpoints" / "step-00000006.safetensors").unlink()
    drawn = invoke(
        "sample", str(run), "--labels", "3", "--steps", "1", "-o", str(tmp_path / "s.png")
    )
    assert "unfinished: the weights are those of step 3" in drawn.stderr
    (shown,) = answer("show", str(run))
    assert (shown["kind"], shown["state"]) == ("training run", "at step 3 of 6")
    assert answer("train", "--resume", str(run), "--threads", "1")["resumed"] == 3
    assert "shift was 1 and is 2" in refusal("train", "--resume", str(run), "--shift", "2")
    assert "autocast was None" in refusal("train", "--resume", str(run), "--amp")
    assert "holds no training run" in refusal("train", "--resume", str(tmp_path / "nothere"))
    assert "--validation must lie in [0, 1)" in refusal("train", "sit-nano", "--validation", "1")
    assert effformer.load_model(effformer_model).config.attn.core.entry.name == "flow"
    (shown,) = answer("show", str(run))
    assert shown["state"] == "finished"


def test_classes_keep_their_names(tmp_path: Path) -> None:
    """A folder of pictures by class: the run, the model and the bundle know what they are called."""
    for i, name in enumerate(["circle", "square", "1"]):
        (tmp_path / "data" / name).mkdir(parents=True)
        for j in range(2):
            picture = torch.full((8, 8), 40 * i + j, dtype=torch.uint8).numpy()
            Image.fromarray(picture).save(tmp_path / "data" / name / f"{j}.png")
    run, bundle = str(tmp_path / "run"), str(tmp_path / "bundle")
    small = ["--set", "patch=4", "--steps", "2", "--batch", "2", "--data", str(tmp_path / "data")]
    invoke("train", "sit-nano", *small, "-o", run)
    invoke("export", run, "--no-verify", "-o", bundle)
    (shown,) = answer("show", run)
    assert shown["trained"]["classes"] == ["1", "circle", "square"]
    for source in (run, bundle):
        words = ["sample", source, "--steps", "1", "-o", str(tmp_path / "s.npy"), "--force"]
        assert answer(*words, "--labels", "square, circle,2")["labels"] == [2, 1, 2]
        assert answer(*words, "--labels", "1")["labels"] == [0]  # the class of that name
        assert answer(*words)["labels"] == [0, 1, 2]
        assert "0..2, named 1, circle, square" in refusal(*words, "--labels", "7")
        assert "did you mean 'circle'" in refusal(*words, "--labels", "circel")
    named, asked = str(tmp_path / "named.npy"), ["--steps", "1", "--labels", "square,1"]
    assert runner.main([bundle, *asked, "--out", named]) == 0
    answer("sample", bundle, *asked, "-o", str(tmp_path / "s.npy"), "--force")
    assert np.array_equal(np.load(named), np.load(tmp_path / "s.npy"))
    assert runner.main([bundle, "--labels", "circel", "--out", named, "--force"]) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_are_sampled(
    saved: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    half = effformer.save_pretrained(effformer.load_model(saved).to(dtype), tmp_path / "half")
    drawn = []
    for source in (saved, half):
        invoke(
            "sample",
            str(source),
            "--labels",
            "3",
            "--steps",
            "2",
            "-o",
            str(tmp_path / "s.npy"),
            "--force",
        )
        drawn.append(torch.from_numpy(np.load(tmp_path / "s.npy")))
    assert drawn[1].dtype == torch.float32
    assert_close(drawn[1], drawn[0], rtol=0, atol=2e-2)


def test_samples_under_a_cache_tell_what_it_is_worth(saved: Path, tmp_path: Path) -> None:
    file, words = str(tmp_path / "s.npy"), ("--labels", "3", "--steps", "12", "--force", "-o")
    plain = answer("sample", str(saved), *words, file)
    assert "cache" not in plain
    before = np.load(file)
    off = answer("sample", str(saved), "--cache", "reuse:every=1", *words, file)
    assert np.array_equal(np.load(file), before)
    assert off["cache"]["computed"] == [1.0] * 12
    reported = ("sample", str(saved), "--cache", "newton:order=1,every=2", "--cache-report")
    told = answer(*reported, *words, file)
    assert told["cache"]["executed"] < told["cache"]["dense"] == off["cache"]["executed"]
    assert [r["name"].split(",")[0] for r in told["report"]["rivals"]] == [
        "euler", "midpoint", "dpm++2m",
    ]  # fmt: skip
    assert "The cache" in invoke(*reported, *words, file).stdout
    for wrong, why in (
        ("newton:order", "write KEY=VALUE"), ("newtons", "unknown cache"), ("reuse:evry=2", "evry"),
    ):  # fmt: skip
        assert why in refusal("sample", str(saved), "--cache", wrong, *words, file)
    assert "--cache-report needs --cache" in refusal(
        "sample", str(saved), "--cache-report", *words, file
    )


def test_training_ends_in_the_time_that_it_is_given(tmp_path: Path) -> None:
    words = ["train", "sit-nano", "--set", "patch=4", "--batch", "4", "--minutes"]
    data = answer(*words, "0.01", "-o", str(tmp_path / "run"))
    assert 1 <= data["steps"] < 2000
    assert "must be positive" in refusal(*words, "0", "-o", str(tmp_path / "other"))
    assert "--device nowhere: cannot be used" in refusal(
        *words, "1", "--device", "nowhere", "-o", str(tmp_path / "other")
    )


def test_train_reads_the_old_name_of_its_loss(tmp_path: Path) -> None:
    words = ["train", "sit-nano", "--set", "patch=4", "--steps", "1", "--batch", "2", "--json"]
    done = invoke(*words, "--objective", "pseudo-huber", "-o", str(tmp_path / "run"))
    assert "--objective is now called --loss" in done.stderr
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert facts["objective"]["loss"]["name"] == "pseudo-huber"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sit-nano",), "Add --out"),
        (("sit-nano", "--data", "digit", "-o", "run"), "did you mean 'digits'"),
        (("sit-nano", "--data", "mnist:missing", "-o", "run"), "missing"),
        (("sit-nano", "--steps", "0", "-o", "run"), "steps must be at least 1"),
        (("sit-nano", "--train", "clipp=1", "-o", "run"), "did you mean 'clip'"),
        (("sit-nano", "--loss", "huber", "-o", "run"), "unknown loss"),
        (("sit-nano", "--loss", "distillation", "-o", "run"), "the tensor 'noise' of the data set"),
    ],
)
def test_train_refuses(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal("train", *words)
