"""Model cards: what they tell, and that they go with their folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import quantize
from typer.testing import CliRunner

import effformer
from effformer.cli.main import app
from effformer.profile import Quality, count_parameters, profile

SAVED = Path(__file__).parents[1] / "saved"


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = effformer.build_model(
        "vit-nano", depth=1, dim=32, heads=2, patch=4, image_size=8, channels=1, num_classes=10
    ).eval()
    with torch.no_grad():
        next(made.parameters()).add_(0.1)  # no longer as drawn
    return made


def told(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["card", *map(str, words)])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def refused(*words: str | Path) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 2
    return " ".join(done.stderr.split())


def test_the_card_of_a_model_counts_it(model: Any, tmp_path: Path) -> None:
    folder = effformer.save_pretrained(model, tmp_path / "m")
    size = sum(p.stat().st_size for p in folder.iterdir())
    card = told(folder)
    for words in (
        "library_name: effformer", 'tags: ["vit", "model"]', "# vit-nano", "A model with trained weights",
        f"| parameters | {count_parameters(model):,} |", f"| bytes | {size:,} |",
        f"| multiply-adds of one sample | {profile(model, model.example_inputs(1)).total:,.0f} |",
        "Not measured; `effformer evaluate` does.", '"image_size": 8',
    ):  # fmt: skip
        assert words in card
    facts = json.loads(told(folder, "--json"))
    assert facts["config"] == model.config.to_dict()
    assert "latency" not in facts
    timed = told(folder, "--latency", "--threads", "1")
    assert "| seconds of one sample |" in timed
    assert f"torch {torch.__version__}" in timed
    assert "with random weights" in told("sit-nano")


def test_the_card_of_a_compressed_model_tells_how(model: Any, tmp_path: Path) -> None:
    small, _ = quantize(model, "int8")
    card = told(effformer.save_pretrained(small, tmp_path / "m"))
    assert "A model with compressed weights" in card
    changes = card.split("## Changes since it was built")[1].split("## ")[0]
    assert '"kind": "quantize"' in changes
    assert max(map(len, changes.splitlines())) < 600


def test_the_card_of_a_run_tells_data_and_licence(tmp_path: Path) -> None:
    run = Path(shutil.copytree(SAVED / "run", tmp_path / "run"))
    facts = json.loads((run / "run.json").read_text())
    facts["about"] = {"call": {"data": "digits"}, "model": {"family": "sit", "name": "sit-nano"}}
    facts["model"]["transforms"] = []
    (run / "run.json").write_text(json.dumps(facts))
    card = told(run)
    assert 'datasets: ["digits"]' in card
    assert "| licence of the data | CC BY 4.0" in card
    assert '| config | {"steps": 6,' in card


def test_the_card_of_a_bundle_is_checked_here(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAVED / "bundle", tmp_path / "b"))
    card = told(folder, "--latency")
    for words in (
        "An edge bundle", "| differs from its record by |", "| seconds of one sample |",
        "| bytes as float32 |", '"sampler": {',
    ):  # fmt: skip
        assert words in card
    (folder / "velocity.onnx").write_bytes(b"x")
    assert "is damaged" in refused("card", folder)


@pytest.mark.skipif(sys.platform != "linux", reason="devices and pipes of Linux")
def test_quality_comes_from_what_evaluate_wrote(model: Any, tmp_path: Path) -> None:
    folder = effformer.save_pretrained(model, tmp_path / "m")
    found = Quality(model="m", data="digits", classes=("a", "b"), counts=((3, 1), (0, 4)), how="so")
    found.save(tmp_path / "q.json")
    card = told(folder, "--quality", tmp_path / "q.json")
    assert "| accuracy | 0.875 |" in card
    assert "| how | so |" in card
    for endless in ("/dev/zero", tmp_path / "pipe"):
        if endless != "/dev/zero":
            os.mkfifo(endless)
        assert "is a device, pipe or socket" in refused("card", folder, "--quality", endless)
        words = ("compress", folder, "--recipe", endless, "-o", tmp_path / "new")
        assert "is a device, pipe or socket" in refused(*words)
    (tmp_path / "other.json").write_text("{}")
    assert "is not what `effformer evaluate" in refused(
        "card", folder, "--quality", tmp_path / "other.json"
    )


def test_a_card_goes_with_its_folder_and_a_readme_of_others_stays(
    model: Any, tmp_path: Path
) -> None:
    folder = effformer.save_pretrained(model, tmp_path / "m")
    place = folder / "README.md"
    told(folder, "-o", place)
    before = place.read_text()
    told(folder, "-o", place)
    assert place.read_text() == before
    effformer.save_pretrained(model, folder)
    assert not place.exists()
    place.write_text("# Mine")
    for force in (False, True):
        with pytest.raises(effformer.FormatError, match=r"also holds README\.md"):
            effformer.save_pretrained(model, folder, force=force)
    assert "holds something that effformer did not write" in refused("card", folder, "-o", place)
    assert place.read_text() == "# Mine"
    assert "ends in .md" in refused("card", folder, "-o", tmp_path / "card.txt")
    assert effformer.load_model(folder).config == model.config
