"""Recipes towards a target: what is tried, what is chosen, and what is said if nothing meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import Exploration, Tried, explore
from effformer.compress.explore.explore import _candidates, loaded
from effformer.compress.quant.control import Goal
from torch import nn
from typer.testing import CliRunner

import effformer
from effformer.checks import CapabilityError, FormatError
from effformer.cli.main import app
from effformer.profile import Benchmark, Latency, SideBySide, machine
from effformer.train import load_data


def tried(name: str, cost: float, drop: float) -> Tried:
    return Tried(
        name=name,
        steps=(),
        latency=cost,
        seconds=1e-3,
        size=cost,
        macs=cost,
        value=1 - drop,
        drop=drop,
    )


def exploration(*rows: Tried, max_drop: float = 0.1, share: float = 0.5) -> Exploration:
    goal = Goal(reference=1.0, max_drop=max_drop, relative=False, best="high")
    dense = tried("dense", 1.0, 0.0)
    return Exploration(
        target="latency", share=share, quality="accuracy", goal=goal, rows=(dense, *rows),
        refused={"d": "why"}, how="in a test",
    )  # fmt: skip


def test_the_least_drop_that_meets_the_target_is_chosen(tmp_path: Path) -> None:
    found = exploration(tried("a", 0.5, 0.05), tried("b", 0.4, 0.08), tried("c", 0.45, 0.3))
    assert found.chosen is not None
    assert found.chosen.name == "a"
    assert [row.name for row in found.front] == ["b", "a", "dense"]
    assert "latency=0.5 with a drop of at most 0.1 in accuracy is met by a" in str(found)
    assert "d: not made, why" in str(found)
    for name in ("a.json", "a.html", "a.txt"):
        found.save(tmp_path / name)
    assert json.loads((tmp_path / "a.json").read_text())["chosen"] == "a"
    assert "<svg" in (tmp_path / "a.html").read_text()


def test_a_target_out_of_reach_names_the_best() -> None:
    found = exploration(tried("a", 0.7, 0.05), tried("b", 0.4, 0.3), tried("c", 0.3, float("inf")))
    assert found.chosen is None
    said = found.verdict()
    assert (
        "is met by none of 3 candidates; within the drop the best reaches latency=0.7 (a)" in said
    )
    assert "at the target the least drop is 0.3 (b)" in said
    json.dumps(found.to_dict(), allow_nan=False)
    assert "latency=1 (dense)" in exploration(tried("a", 0.2, 0.3)).verdict()


def test_candidates_suit_the_target() -> None:
    for target in ("size", "macs", "latency"):
        for name, steps in _candidates(target, 0.5, 7, measured=True):  # type: ignore[arg-type]
            verbs = [next(iter(step)) for step in steps]
            assert ("distill" in verbs) == ("prune" in verbs), name
            assert effformer.compress.Recipe.from_dict({"steps": steps})
    assert not any("distill" in str(s) for _, s in _candidates("macs", 0.5, 0, measured=True))
    names = [name for name, _ in _candidates("size", 0.1, 0, measured=False)]
    assert names == [
        "int8", "int4", "mixed for 0.1", "pruned to 0.381 in int8", "pruned to 0.653 in int4",
    ]  # fmt: skip


def model() -> effformer.models.Model:
    torch.manual_seed(0)
    return effformer.build_model(
        "vit-nano", image_size=8, num_classes=10, depth=1, dim=32, heads=2, patch=4, channels=1
    ).eval()


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of their own take seconds each; what they would load is called here."""

    def benchmark(candidates: Any, *, threads: Any, rounds: int) -> Benchmark:
        rows, ratios = {}, {}
        for one in candidates:
            one.load(**one.options)()
            rows[one.name] = Latency(
                name=one.name, median=1e-3, p10=1e-3, p90=1e-3, runs=1, warmup=0, threads=1,
                dtype="float32", device="cpu", form="eager", machine=machine(), samples=(1e-3,),
            )  # fmt: skip
            ratios[one.name] = 1.0
        return Benchmark(sides={1: SideBySide(rows, ratios)}, errors={}, rounds=rounds)

    monkeypatch.setattr(sys.modules[loaded.__module__], "benchmark", benchmark)


@pytest.mark.usefixtures("untimed")
def test_a_model_is_made_smaller_and_saved_with_a_report(tmp_path: Path) -> None:
    dense, out = model(), tmp_path / "out"
    data = load_data("digits")
    small, found = explore(
        dense, "size", 0.35, out, data=data, quality="agreement", max_drop=0.2, steps=0, samples=64
    )
    assert found.chosen is not None
    assert found.chosen.size <= 0.35
    assert found.chosen.drop <= 0.2
    assert found.rows[0].name == "dense"
    assert found.rows[0].drop == 0
    assert {p.name for p in out.iterdir()} >= {"report.html", "report.json", "model", "candidates"}
    assert found.boxes is not None
    assert found.boxes.names == ("before", found.chosen.name)
    assert '<span class="box">' in (out / "report.html").read_text(encoding="utf-8")
    again = effformer.load_model(out / "model").eval()
    x = dense.example_inputs(2)
    with torch.no_grad():
        assert torch.equal(again(**x), small.eval()(**x))
    with pytest.raises(ValueError, match="is met by none of"):
        explore(dense, "size", 0.01, out, data=data, max_drop=0.0, steps=0, samples=64)
    with torch.no_grad():
        next(dense.parameters()).add_(1)
    with pytest.raises(FormatError, match="the run of another model"):
        explore(dense, "size", 0.35, out, data=data, steps=0, samples=64)


@pytest.mark.slow
@pytest.mark.usefixtures("untimed")
def test_work_and_the_command(tmp_path: Path) -> None:
    effformer.save_pretrained(model(), tmp_path / "model")
    words = ["compress", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--json"]
    more = ["--data", "digits", "--steps", "2", "--samples", "32", "--max-drop", "5"]
    done = CliRunner().invoke(app, [*words, "--for", "macs=0.7", *more])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    chosen = next(row for row in data["rows"] if row["name"] == data["chosen"])
    assert chosen["macs"] <= 0.7
    assert [next(iter(step)) for step in chosen["steps"]] == ["prune", "distill"]
    for wrong, said in (
        (["--for", "speed=1"], "expected latency=, size= or macs="),
        (["--for", "size=2"], "a share of at most 1"),
        (["--for", "size=0.5", "--scheme", "int8"], "does not go with --for"),
    ):
        done = CliRunner().invoke(app, [*words, *wrong])
        assert done.exit_code == 2
        assert said in done.output


def test_wrong_models_data_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="is no model of ours"):
        explore(nn.Linear(3, 3), "size", 0.5, tmp_path / "out")
    with pytest.raises(ValueError, match="needs data with labels"):
        explore(model(), "size", 0.5, tmp_path / "out", quality="accuracy")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(FormatError, match="holds other files"):
        explore(model(), "size", 0.5, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "out").exists()
