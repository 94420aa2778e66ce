"""Recipes: read and checked before anything runs, run step by step, and gone on with after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import Budgeted, Recipe, quantize, run_recipe
from effformer.compress.recipe import steps as verbs
from torch import nn
from typer.testing import CliRunner

import effformer
from effformer.checks import CapabilityError, FormatError
from effformer.cli.main import app
from effformer.train import load_data

YAML = """
data: digits
samples: 32
steps:
  - prune: {macs: 0.7}
  - distill: {steps: 3, batch: 8, lr: 1e-3}
  - quantize:
      schemes: [int8, int4]
      budget: {bytes: 0.3}
"""
TINY = {"depth": 1, "dim": 32, "heads": 2, "patch": 4, "channels": 1}


def classifier() -> effformer.models.Model:
    torch.manual_seed(0)
    return effformer.build_model("vit-nano", image_size=8, num_classes=10, **TINY).eval()


def generator() -> effformer.models.Model:
    torch.manual_seed(0)
    model = effformer.build_model(
        "sit-nano", input_size=8, num_classes=10, learn_sigma=False, **TINY
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("make", [classifier, generator])
def test_a_recipe_of_three_verbs(make: Any, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(YAML)
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    said: list[str] = []
    small, report = run_recipe(model, tmp_path / "small.yaml", tmp_path / "out", told=said.append)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [step["step"] for step in report.steps] == ["prune", "distill", "quantize"]
    assert report.steps[0]["report"]["macs_ratio"] <= 0.7
    assert report.steps[1]["report"]["steps"] == 3
    assert report.steps[2]["bytes"] <= 0.3 * report.steps[1]["bytes"]
    assert report.ratio < 0.3
    assert any("step 2 of 3: distill" in words for words in said)
    loaded = effformer.load_model(tmp_path / "out/model")
    inputs = model.example_inputs(2)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs), small.eval()(**inputs))
    folders = {p.name for p in (tmp_path / "out").iterdir()}
    assert folders == {"1-prune", "2-distill", "3-quantize", "model", "recipe.json"}
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_run_that_was_stopped_goes_on_behind_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"steps": [{"prune": {"macs": 0.7}}, {"quantize": {"scheme": "int8"}}]}
    whole, _ = run_recipe(classifier(), given, tmp_path / "whole")
    run = verbs.Quantize.run
    monkeypatch.setattr(verbs.Quantize, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(classifier(), given, tmp_path / "out")
    assert not (tmp_path / "out/model").exists()
    monkeypatch.setattr(verbs.Quantize, "run", run)
    monkeypatch.setattr(verbs.Prune, "run", stopped)  # is not run again
    small, report = run_recipe(classifier(), given, tmp_path / "out")
    assert report.resumed == 1
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in small.state_dict().items())
    _, again = run_recipe(classifier(), given, tmp_path / "out")
    assert again.resumed == 2


def stopped(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_training_that_was_stopped_goes_on_at_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"data": "digits", "steps": [{"distill": {"steps": 4, "batch": 4, "warmup": 0}}]}
    whole, _ = run_recipe(classifier(), given, tmp_path / "whole")
    train, calls = verbs.train, []

    def twice(*args: Any, **options: Any) -> Any:
        def look(model: nn.Module, step: int) -> None:
            calls.append(step)
            if len(calls) == 2:
                raise KeyboardInterrupt

        return train(*args, **options, evaluate=look, evaluate_every=1, save_every=1)

    monkeypatch.setattr(verbs, "train", twice)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(classifier(), given, tmp_path / "out")
    small, report = run_recipe(classifier(), given, tmp_path / "out")
    assert len(calls) < 2 + 4
    assert report.resumed == 0
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in small.state_dict().items())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"1-distill", "model", "recipe.json"}


def test_another_run_in_the_folder_is_refused_or_replaced(tmp_path: Path) -> None:
    int8, int4 = ({"steps": [{"quantize": {"scheme": name}}]} for name in ("int8", "int4"))
    out = tmp_path / "out"
    run_recipe(classifier(), int8, out)
    with pytest.raises(FormatError, match=r"the run of another recipe; .*--force"):
        run_recipe(classifier(), int4, out)
    other = classifier()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(FormatError, match="the run of another model"):
        run_recipe(other, int8, out)
    with pytest.raises(FormatError, match="the run of another data"):
        run_recipe(classifier(), int8, out, data=load_data("digits"))
    _, report = run_recipe(classifier(), int4, out, force=True)
    assert report.resumed == 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    with pytest.raises(FormatError, match="holds other files"):
        run_recipe(classifier(), int8, tmp_path / "notes")
    facts = json.loads((out / "recipe.json").read_text())
    for done in (3, [3], [{"step": "quantize"}]):
        (out / "recipe.json").write_text(json.dumps(facts | {"done": done}))
        with pytest.raises(FormatError, match="is damaged"):
            run_recipe(classifier(), int4, out)
    (out / "recipe.json").write_text(json.dumps(facts))
    shutil.rmtree(out / "1-quantize")
    _, report = run_recipe(classifier(), int4, out)  # a step that is gone is made again
    assert report.resumed == 0
    (out / "recipe.json").write_text("{}")
    with pytest.raises(FormatError, match="did not write"):
        run_recipe(classifier(), int8, out)


def test_other_verbs_and_metrics(tmp_path: Path) -> None:
    steps: list[Any] = [
        {"approximate": {"keys": [4], "most": 1, "where": "blocks.*.attn"}},
        {"adapt": {"rank": 2, "where": "blocks"}},
        {"distill": {"steps": 2, "batch": 4, "losses": ["logits", "hidden"], "weight": 0.5}},
        "merge",
        {"sparsify": {"kind": "wanda", "where": "blocks.*.ffn"}},
        {"quantize": {"scheme": "int4", "metric": "agreement", "max_drop": 0.02, "skip": "head"}},
    ]
    data = load_data("digits")
    small, report = run_recipe(classifier(), {"steps": steps, "samples": 64}, tmp_path, data=data)
    assert [step["step"] for step in report.steps] == [
        "approximate",
        "adapt",
        "distill",
        "merge",
        "sparsify",
        "quantize",
    ]
    assert report.steps[-1]["report"]["drop"] <= 0.02
    assert set(report.steps[4]["report"]) == {"blocks.0.ffn.part.fc1", "blocks.0.ffn.part.fc2"}
    assert {r["kind"] for r in small.transforms} <= {"quantize"}
    for metric in ("accuracy", "error"):
        last = {"steps": [{"quantize": {"metric": metric, "max_drop": 0.5}}]}
        run_recipe(classifier(), last, tmp_path / metric, data=data)


def test_networks_become_experts_and_are_trained_on(tmp_path: Path) -> None:
    steps = [{"upcycle": {"experts": 2, "top_k": 1}}, {"distill": {"steps": 1, "batch": 4}}]
    given = {"data": "digits", "steps": steps}
    wide, report = run_recipe(classifier(), given, tmp_path)
    assert report.steps[0]["report"]["places"]
    assert wide.config.ffn.experts == 2
    loaded: Any = effformer.load_model(tmp_path / "model")
    assert loaded.config == wide.config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "steps: expected a list"),
        ({"steps": []}, "steps: expected a list"),
        ({"stepz": []}, "did you mean 'steps'"),
        ({"steps": [{"prun": {}}]}, r"steps\[0\]: unknown verb 'prun'; did you mean 'prune'"),
        ({"steps": [{"prune": {}, "quantize": {}}]}, "expected one verb with its options"),
        ({"steps": [3]}, "expected one verb with its options"),
        ({"steps": [{"prune": 3}]}, "expected options such as"),
        ({"steps": [{"prune": {"mac": 0.5}}]}, "did you mean 'macs'"),
        ({"steps": [{"prune": {"macs": 2}}]}, "must lie in"),
        ({"steps": [{"quantize": {"scheme": "int44"}}]}, "did you mean 'int4'"),
        ({"steps": [{"quantize": {"schemes": ["int8"]}}]}, "go together"),
        ({"steps": [{"quantize": {"schemes": ["int8"], "budget": {"bit": 3}}}]}, "one of bits"),
        ({"steps": [{"distill": {"steps": 0}}]}, "must be at least 1"),
        ({"steps": [{"distill": {"losses": ["logit"]}}]}, "did you mean 'logits'"),
        ({"steps": [{"merge": {}}]}, "merge follows adapt"),
        ({"steps": [{"merge": {"a": 1}}]}, "unknown option 'a'"),
        ({"steps": [{"quantize": {}}, {"prune": {}}]}, "needs dense weights"),
        ({"steps": [{"sparsify": {}}, {"distill": {}}]}, "would fill its zeros"),
        ({"steps": [{"linearize": {}}]}, "'attn' is missing|missing .*attn"),
        ({"steps": [{"acmize": {"steps": [1, 2]}}]}, "steps"),
        ({"steps": [{"dynamize": {"width": "dynamo"}}]}, "did you mean 'dynamic'"),
        ({"steps": ["approximate", {"acmize": {}}]}, "put it before approximate"),
        ({"steps": ["adapt", {"acmize": {}}]}, "put it before adapt"),
        ({"steps": ["adapt", {"upcycle": {}}]}, "put it before adapt"),
        ({"steps": [{"upcycle": {"expert": 4}}]}, "did you mean 'experts'"),
        ({"steps": ["dynamize", "acmize"]}, r"steps\[1\]: acmize after dynamize: .* ffn=False"),
        (
            {"steps": ["acmize", {"dynamize": {"width": None}}]},
            "dynamize after acmize: .* ffn=False",
        ),
        ({"steps": [{"acmize": {"ffn": False}}, "dynamize"]}, "over='ffn'"),
        ({"steps": ["dynamize", "upcycle"]}, "upcycle after dynamize: .* other blocks"),
        ({"steps": ["acmize", "upcycle"]}, "upcycle after acmize: .* other blocks"),
        ({"steps": [{"quantize": {}}], "samples": 0}, "samples must be"),
        ({"steps": [{"quantize": {}}], "data": 3}, "data: expected the name"),
    ],
    ids=str,
)
def test_wrong_recipes_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        Recipe.from_dict(given)


def test_wrong_files_models_and_data_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for text, words in (
        ("steps: [", r"no readable YAML in line 1"),
        ("- a", "expected keys such as"),
        ("\x00", "no readable"),
    ):
        file.write_text(text)
        with pytest.raises(FormatError, match=words):
            Recipe.read(file)
    with pytest.raises(FormatError, match="no such file"):
        Recipe.read(tmp_path / "none.yaml")
    given = {"steps": [{"distill": {"steps": 1}}]}
    with pytest.raises(CapabilityError, match="is no model of ours"):
        run_recipe(nn.Linear(3, 3), given, tmp_path / "out")
    with pytest.raises(ValueError, match="no samples to train on"):
        run_recipe(classifier(), given, tmp_path / "out")
    bad = {"x": torch.full((4, 1, 8, 8), torch.nan), "y": torch.zeros(4).long()}
    for make in (classifier, generator):
        with pytest.raises(ValueError, match="NaN or infinite"):
            run_recipe(make(), {"steps": [{"prune": {}}]}, tmp_path / make.__name__, data=bad)


def test_it_is_explained_and_read_back() -> None:
    made = Recipe.from_dict(
        {"data": "digits", "steps": [{"prune": {"macs": 0.5}}, {"quantize": None}]}
    )
    assert "1. prune(macs=0.5): heads, channels" in made.explain()
    assert Recipe.from_dict(made.to_dict()).to_dict() == made.to_dict()


def test_the_command(tmp_path: Path) -> None:
    effformer.save_pretrained(classifier(), tmp_path / "model")
    (tmp_path / "r.yaml").write_text("steps: [{prune: {macs: 0.7}}, {quantize: {scheme: int8}}]")
    words = ["compress", str(tmp_path / "model"), "--recipe", str(tmp_path / "r.yaml")]

    def said(*more: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*words, *more])
        assert done.exit_code == code, done.output
        return done.output

    assert "2. quantize(scheme=int8)" in said("--explain")
    assert not (tmp_path / "out").exists()
    out = ("-o", str(tmp_path / "out"))
    assert "saved in" in said(*out)
    assert "from an earlier run" in said(*out)
    assert "--scheme is said by the recipe" in said(*out, "--scheme", "int8", code=2)
    assert "is the model itself" in said("-o", str(tmp_path / "model"), code=2)
    done = CliRunner().invoke(app, [*words[:2], "--explain", *out])
    assert "give one" in done.output


@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_other_parts_are_put_in_one_after_the_other_and_go_on_after_a_stop(
    more: bool, tmp_path: Path
) -> None:
    few = {"batch": 4}
    gates = {"steps": 2, "tokens": None, "width": {"name": "dynamic", "over": "ffn"}, **few}
    steps: list[Any] = [
        {"linearize": {"attn": "flow", "steps": 2, "whole": 2, **few}},
        *([{"dynamize": gates}] if more else []),
        {"acmize": {"ffn": False, "steps": [2, 1, 4], **few}},
        *([{"quantize": {"where": "blocks.*.ffn"}}] if more else []),
    ]
    given = {"data": "digits", "steps": steps}
    small, report = run_recipe(generator(), given, tmp_path / "whole")
    assert [step["step"] for step in report.steps] == [next(iter(step)) for step in steps]
    assert small.config.attn.core.entry.name == "flow"
    assert small.config.attn.projections is not None
    if more:
        assert small.config.width.over == "ffn"
        assert report.steps[1]["report"]["executed"] > 0
    json.dumps(report.to_dict(), allow_nan=False)
    loaded = effformer.load_model(tmp_path / "whole/model")
    inputs = generator().example_inputs(2)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs), small.eval()(**inputs))
    with pytest.MonkeyPatch.context() as patch:  # killed in the third stage of acmize
        patch.setattr(Budgeted, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(generator(), given, tmp_path / "out")
    done = 2 if more else 1
    assert not (tmp_path / f"out/{done + 1}-acmize").exists()
    again, report = run_recipe(generator(), given, tmp_path / "out")
    assert report.resumed == done
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_first_step_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    packed, _ = quantize(effformer.build_model("vit-nano", depth=1), "int8")
    steps = {"steps": [{"prune": {"macs": 0.6}}]}
    with pytest.raises(ValueError, match="prune first, then quantize"):
        run_recipe(packed, steps, tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    twice = {"steps": [{"quantize": {"scheme": "int8"}}] * 2}
    with pytest.raises(ValueError, match="already quantized"):
        run_recipe(effformer.build_model("vit-nano", depth=1), twice, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.json", "1-quantize"}
