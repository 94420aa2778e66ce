"""How a training is asked for: recipes by name, parts with options in one word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from effformer import load_model
from effformer.cli.common import named, pairs_of
from effformer.config import resolve
from effformer.flow.losses import FlowMatching
from effformer.train import read_run
from effformer.train.recipes import RECIPES

from .running import answer, invoke, refusal

FEW = (
    "--set",
    "depth=1",
    "--set",
    "patch=4",
    "--batch",
    "2",
    "--warmup",
    "0",
    "--train",
    "ema=0.5",
)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("flow", "flow"),
        ("flow:", "flow"),
        ("flow:eps=1e-5", {"name": "flow", "eps": 1e-5}),
        ("a:b=[1, 2],c.d=x", {"name": "a", "b": [1, 2], "c": {"d": "x"}}),
        ('a:b={"c": "d,e"},f="g,h"', {"name": "a", "b": {"c": "d,e"}, "f": "g,h"}),
        ("a:time=shifted,time.shift=3", {"name": "a", "time": {"name": "shifted", "shift": 3}}),
    ],
)
def test_parts_with_options(text: str, made: Any) -> None:
    assert named(text) == made


def test_pairs_end_where_their_brackets_do() -> None:
    assert pairs_of("") == []
    assert pairs_of("attn=flow,depth=6") == ["attn=flow", "depth=6"]
    assert pairs_of("a=[1,b=2") == ["a=[1,b=2"]  # never closed: its value is refused


def mnist(folder: Path) -> str:
    """As `load_data` names a folder with files of the kind of MNIST, one image a class."""
    for kind, head, size in (("images-idx3", (10, 28, 28), 7840), ("labels-idx1", (10,), 10)):
        sizes = b"".join(n.to_bytes(4, "big") for n in head)
        raw = bytes([0, 0, 8, len(head)]) + sizes + bytes(range(10)) * (size // 10)
        (folder / f"train-{kind}-ubyte").write_bytes(raw)
    return f"mnist:{folder}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_decides_what_is_not_given(name: str, tmp_path: Path) -> None:
    recipe, run = RECIPES[name], tmp_path / "run"
    data = ("--data", mnist(tmp_path)) if recipe.data == "mnist" else ()
    done = invoke("train", "--recipe", name, "--steps", "2", *FEW, *data, "-o", str(run))
    assert recipe.measured in done.stderr
    facts = read_run(run)
    expected = recipe.config.replace(steps=2, batch=2, warmup=0, ema=0.5)
    assert facts["config"] == json.loads(json.dumps(expected.to_dict()))
    assert facts["objective"] == recipe.objective.to_dict()
    assert facts["about"]["call"]["recipe"] == name
    assert facts["about"]["call"]["model"] == recipe.model
    # the folder alone tells the rest, whatever becomes of the recipe
    assert answer("train", "--resume", str(run))["resumed"] == 2
    assert "not begun by the recipe" in refusal(
        "train", "--resume", str(run), "--recipe", next(r for r in RECIPES if r != name)
    )


def test_recipes_are_named_where_one_is_missing(tmp_path: Path) -> None:
    said = refusal("train", "--recipe", "digts", "-o", str(tmp_path / "run"))
    assert "did you mean 'digits'? (choices: digits, digits-quick, mnist)" in said
    said = refusal("train", "--recipe", "mnist", "-o", str(tmp_path / "run"))
    assert "needs the folder that holds it: 'mnist:DIR'" in said
    assert "which model? Name one" in refusal("train", "-o", str(tmp_path / "run"))


def test_losses_take_options(tmp_path: Path) -> None:
    words = ("train", "sit-nano", *FEW, "--steps", "1", "-o", str(tmp_path / "run"))
    invoke(*words, "--loss", "flow-matching:time=shifted,time.shift=3,cosine=0.5")
    made = resolve("loss", read_run(tmp_path / "run")["objective"]["loss"])
    assert isinstance(made, FlowMatching.Config)
    assert (made.cosine, made.time.shift) == (0.5, 3.0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("flow-matching:cosine=-1", "loss.cosine must be at least 0"),
        ("flow-matching:cosine=x", "expected float, got 'x'"),
        ("flow-matching:tme=u-shaped", "did you mean 'time'"),
        ("flow-matching:time=logitnormal", "did you mean 'logit-normal'"),
        ("flow-matching:time", "flow-matching:time: write KEY=VALUE"),
        (":cosine=1", "unknown loss ''"),
    ],
)
def test_wrong_options_of_losses(loss: str, message: str) -> None:
    assert message in refusal("train", "sit-nano", "--loss", loss, "-o", "run")


def test_attentions_take_options_of_the_same_form(tmp_path: Path) -> None:
    for i, words in enumerate((["flow:eps=1e-5"], ["flow", "--set", "attn.eps=1e-5"])):
        invoke("build", "sit-nano", "--attn", *words, "-o", str(tmp_path / str(i)))
    one, other = ((tmp_path / name / "config.json").read_text() for name in "01")
    assert one == other
    assert '"eps": 1e-05' in one


def test_schemes_take_options_of_the_same_form(saved: Path, tmp_path: Path) -> None:
    for i, words in enumerate((["int8:block=32"], ["int8", "--set", "block=32"])):
        invoke("compress", str(saved), "--scheme", *words, "-o", str(tmp_path / str(i)))
    one, other = (load_model(tmp_path / name).transforms for name in "01")
    assert one == other
    assert '"block": 32' in json.dumps(one)
    assert "unknown option 'blok'" in refusal(
        "compress", str(saved), "--scheme", "int8:blok=32", "-o", str(tmp_path / "2")
    )
    found = answer(
        "sensitivity", str(saved), "--scheme", "int8:block=32", "--where", "blocks.0.ffn"
    )
    assert {row["scheme"] for row in found["rows"]} == {"int8 block=32"}
