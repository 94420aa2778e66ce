from __future__ import annotations

import inspect

import pytest
import torch

import effformer
from effformer import registry
from effformer.checks import MissingExtra, need

SMALLEST = {e.facts["family"]: e.name for e in registry.model}  # tiny sizes are registered last


@pytest.mark.parametrize("name", SMALLEST.values())
def test_every_family_builds_from_its_config(name: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
        again = type(model)(model.config)
    assert model.name == name
    assert repr(model).startswith(f"{type(model).__name__}(\n  '{name}'")
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in again.state_dict().items()} == shapes
    axes, arguments = set(model.dynamic_axes()), set(inspect.signature(model.forward).parameters)
    assert set(model.example_inputs(2)) <= axes <= arguments


def test_lists() -> None:
    assert "dit-tiny" in effformer.list_models("dit*")
    assert effformer.list_models("DIT-B*") == ["dit-b-2", "dit-b-4", "dit-b-8"]
    assert {"flow", "linear"} <= set(effformer.list_attention(cost="n"))
    assert "softmax" not in effformer.list_attention(cost="n")
    assert "mlp" in effformer.list_ffn()
    assert "adaln-zero" in effformer.list_blocks(cond=True)
    assert "prenorm" not in effformer.list_blocks(cond=True)


def test_unknown_models_suggest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'dit-b/22'; did you mean 'dit-b/2'"):
        effformer.build_model("dit-b/22")


def test_public_names() -> None:
    missing = [n for n in effformer.__all__ if n not in dir(effformer)]
    assert not missing
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        effformer.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_missing_packages_say_how_to_get_them() -> None:
    with pytest.raises(
        MissingExtra, match=r"'no_such_module' cannot be .* pip install 'effformer\[x\]'"
    ):
        need("no_such_module", "x")
