"""`effformer evaluate`: classifiers, generators and bundles, on the data that they know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import effformer
from effformer.train import Classifier, load_data

from .running import answer, invoke, refusal


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that looks at single pixels, in place of one that is trained for seconds."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    monkeypatch.setattr(
        "effformer.train.train_classifier", lambda data, seed: Classifier(network, 0.75)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ("--steps", "2", "--batch", "4", "--warmup", "0", "--set", "patch=4")
    invoke("train", "sit-nano", *words, "-o", str(folder))
    return folder


def test_classifiers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = effformer.build_model("vit-nano", image_size=8, channels=1, num_classes=10, patch=4)
    effformer.save_pretrained(model.eval(), tmp_path / "vit")
    found = answer("evaluate", str(tmp_path / "vit"), "--data", "digits")
    data = load_data("digits")
    with torch.inference_mode():
        right = (model(data["x"]).argmax(1) == data["y"]).double().mean().item()
    assert found["accuracy"] == pytest.approx(right)
    assert found["samples"] == 1797
    assert sum(map(sum, found["confusion"])) == 1797
    assert found["frechet_distance"] is None
    said = refusal("evaluate", str(tmp_path / "vit"), "--data", "digits", "--steps", "3")
    assert "draws no samples; leave --steps out" in said
    half = answer("evaluate", str(tmp_path / "vit"), "--data", "digits", "--dtype", "bfloat16")
    assert half["accuracy"] == pytest.approx(right, abs=0.05)


@pytest.mark.usefixtures("judged")
def test_runs_are_compared_with_their_data(run: Path, tmp_path: Path) -> None:
    words = ("evaluate", str(run), "--samples", "24", "--steps", "2")
    found = answer(*words, "-o", str(tmp_path / "q.html"))
    assert (found["data"], found["judge_accuracy"], found["samples"]) == ("digits", 0.75, 24)
    assert [sum(row) for row in found["confusion"]] == [3, 3, 3, 3, *[2] * 6]
    # what was trained for two steps is further from digits than digits are
    assert found["frechet_distance"] > 2 * found["frechet_distance_of_real"] > 0
    assert "steps 2, guidance 2.0, sampler euler, seed 0; train part of digits" in found["how"]
    assert (tmp_path / "q.html").read_text().count("<svg") == 1
    assert answer(*words) == found  # all of it is seeded


@pytest.mark.usefixtures("judged")
def test_bundles_draw_what_their_models_draw(run: Path, tmp_path: Path) -> None:
    invoke("export", str(run), "-o", str(tmp_path / "bundle"), "--no-verify")
    words = ("--data", "digits", "--samples", "20", "--steps", "2", "--guidance", "1.5")
    one, other = (answer("evaluate", str(place), *words) for place in (run, tmp_path / "bundle"))
    assert other["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-3)
    assert "a bundle runs on the CPU" in refusal(
        "evaluate", str(tmp_path / "bundle"), *words, "--dtype", "bfloat16"
    )


def test_what_does_not_fit_is_refused(run: Path, tmp_path: Path) -> None:
    assert "on what?" in refusal("evaluate", str(run / "model"))
    assert "draws 1x8x8, digits has 1x16x16; --size" in refusal(
        "evaluate", str(run), "--size", "16"
    )
    shapes = tmp_path / "shapes"
    from PIL import Image

    for name in ("circle", "square"):
        (shapes / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(shapes / name / "1.png")
    said = refusal("evaluate", str(run), "--data", str(shapes))
    assert "draws other classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)" in said
    assert "must end in .json, .html or .txt" in refusal("evaluate", str(run), "-o", "q.png")


@pytest.mark.slow
@pytest.mark.usefixtures("judged")
def test_bench_draws_times_against_quality(run: Path, tmp_path: Path) -> None:
    said = refusal("bench", "sit-nano", "--quality", "digits")
    assert "needs folders of runs, models or bundles, sit-nano is none" in said
    said = refusal("bench", str(run), "--quality", "digits", "--forms", "onnx,onnx-int8")
    assert "which onnx-int8 changes" in said
    assert "unknown data set 'digts'" in refusal("bench", str(run), "--quality", "digts")
    few = ["--rounds", "1", "--runs", "1", "--warmup", "0", "--threads", "1"]
    page = tmp_path / "bench.html"
    (row,) = answer("bench", str(run), "--quality", "digits", *few, "-o", str(page))["rows"]
    words = ("evaluate", str(run), "--samples", "500")
    assert row["quality"] == answer(*words)["recognised"]
    assert "not recognised / %" in page.read_text()
