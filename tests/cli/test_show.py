from __future__ import annotations

import dataclasses

import pytest

from effformer import registry
from effformer.build import build_model
from effformer.checks import CapabilityError
from effformer.testing.matrix import Built, beside, places

from .running import answer, invoke, refusal


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_option_has_a_meaning(kind: str) -> None:
    for entry in registry.KINDS[kind]:
        if entry.config is not None:
            fields = {field.name for field in dataclasses.fields(entry.config)}
            assert {*entry.config.meanings()} == fields, entry.name


def test_meanings_are_those_of_the_nearest_class() -> None:
    said = registry.core.get("softmax").config.meanings()
    assert said["causal"] == "output i depends on tokens <= i only."
    assert said["scale"] == "factor of the scores; None means K^-0.5."
    # what goes on in a second line, is one sentence
    assert said["backend"].endswith('(CUDA only) or "reference" (explicit products).')


def test_options_are_explained_without_marks() -> None:
    said = invoke("show", "swiglu").stdout
    assert "    hidden: inner width; overrides ratio." in said.splitlines()
    assert "`" not in said
    assert answer("show", "swiglu")[0]["options"]["act"] == "activation."


def test_what_works_where_is_what_can_be_built() -> None:
    (facts,) = answer("show", "axes", "--compat")
    works = facts["works"]
    assert works["models"]["vit.attn"] == {}
    assert works["models"]["bert.attn"].endswith("needs a token grid, which this model has not")
    assert works["blocks"]["prenorm"] == {}
    assert "queries, keys and values" in works["blocks"]["joint"]
    assert {*works["blocks"]} == {*registry.block.names()}
    build_model("vit-nano", attn="axes")
    with pytest.raises(CapabilityError, match="needs a token grid"):
        build_model("bert-tiny", attn="axes")


def test_each_kind_has_its_partners() -> None:
    assert isinstance(beside("ffn", "swiglu")["macaron"], Built)
    assert isinstance(places("attention", "linformer")["dit.attn"], Built)
    said = invoke("show", "lmu", "--compat").stdout
    assert "no masks; no rotary tables; needs no grid; " in said
    assert "\n      not " in said


@pytest.mark.slow
def test_the_partners_of_a_block_are_mixers() -> None:
    found = beside("block", "joint")
    assert isinstance(found["flow"], Built)
    assert not isinstance(found["axes"], Built)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("euler", "show euler --compat: a sampler stands in no slot of a model"),
        ("dit-b", "a model stands in no slot"),
        (".", "show . --compat: wants the name of a part"),
    ],
)
def test_what_stands_in_no_slot_is_refused(name: str, message: str) -> None:
    assert message in refusal("show", name, "--compat")
