"""`list models` shows sizes of every model, which are those of the models."""

from __future__ import annotations

import pytest
import sizes

from effformer import registry
from effformer.cli.list import model_sizes

from .running import answer, invoke

SMALL = [name for name in registry.model.names() if name.endswith("-nano")]


def test_sizes_are_those_of_the_models() -> None:
    assert SMALL
    assert sizes.stale(SMALL[:4]) == []
    assert {*model_sizes()} == {*registry.model.names()}


@pytest.mark.slow
def test_so_are_all_others() -> None:
    assert sizes.stale(registry.model.names()) == []


def test_what_is_out_of_date_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"parameters": 1, "macs": 1, "inputs": {}}
    monkeypatch.setattr(sizes, "size", lambda name: wrong)
    assert sizes.stale(["dit-nano"]) == ["dit-nano"]
    assert sizes.main(["--check", "dit-nano"]) == 1


def test_one_line_a_model() -> None:
    lines = [
        line.split() for line in invoke("list", "models", "--like", "dit-*").stdout.splitlines()
    ]
    rows = {words[0]: words[1:] for words in lines if words and words[0].startswith("dit")}
    assert rows["dit-xl-2"] == ["675.1", "M", "118.6", "G", "4x32x32", "2212.09748"]
    assert {*rows} == {*registry.model.names("dit-*")}
    (facts,) = answer("list", "models", "--like", "sit-nano")
    assert facts["macs"] == model_sizes()["sit-nano"]["macs"] > 1e6
    assert facts["inputs"]["x"] == [4, 32, 32]
