"""Calibration data in float32 for models in half precision: every verb takes them as converted by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import (
    approximate,
    linearize,
    prune,
    quantize,
    run_recipe,
    sensitivity,
    sparsify,
)
from torch import Tensor

import effformer
from effformer.train import Classification, Dataset, load_data

TASK = Classification()
FIT = {"attn": "flow", "steps": 1, "whole": 1, "batch": 4}
VERBS: dict[str, Callable[[Any, Any, Path], Any]] = {
    "quantize": lambda model, data, _: quantize(model, "gptq", data=data)[0],
    "prune": lambda model, data, _: prune(model, {"keep": 0.5}, data=data)[0],
    "prune by a loss": lambda model, data, _: prune(
        model, {"keep": 0.5, "importance": "taylor"}, data=data, objective=TASK
    )[0],
    "sparsify": lambda model, data, _: sparsify(model, {"kind": "wanda"}, data=data)[0],
    "approximate": lambda model, data, _: approximate(model, data=data, objective=TASK)[0],
    "linearize": lambda model, data, _: linearize(model, FIT, data=data, progress=False)[0],
    "linearize by a loss": lambda model, data, _: linearize(
        model, FIT, data=data, objective=TASK, progress=False
    )[0],
    "recipe": lambda model, data, out: run_recipe(
        model, {"steps": [{"quantize": {"scheme": "gptq"}}]}, out / "out", data=data
    )[0],
}


@pytest.fixture
def half() -> Any:
    torch.manual_seed(0)
    return effformer.build_model("vit-nano", depth=1, num_classes=10).eval().bfloat16()


@pytest.fixture
def digits() -> dict[str, Tensor]:
    return {name: x[:8] for name, x in load_data("digits").tensors.items()}


def by_hand(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return data | {"x": data["x"].bfloat16()}


@pytest.mark.parametrize("verb", VERBS)
def test_data_come_in_the_numbers_of_the_model(
    verb: str, half: Any, digits: dict[str, Tensor], tmp_path: Path
) -> None:
    run = VERBS[verb]
    expected = run(half, by_hand(digits), tmp_path / "a").state_dict()
    for name, data in (("b", digits), ("c", Dataset("digits", digits)), ("d", [digits])):
        found = run(half, data, tmp_path / name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], x) for key, x in expected.items()), name


def test_positions_and_measures_too(half: Any, digits: dict[str, Tensor]) -> None:
    told = [
        [row.mse for row in sensitivity(half, ["int8"], data=data, runs=1).rows]
        for data in (by_hand(digits)["x"], digits["x"], (digits["x"],), [[digits["x"]]])
    ]
    assert told.count(told[0]) == 4
