"""Wrong calls of public functions are answered rightly, or refused in a sentence of ours."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch

from . import flows, public
from .corpus import Entry, fault, trials

ENTRIES = [*flows.ENTRIES, *public.ENTRIES]
DEAR = re.compile(
    "benchmark|check_part|export|graph|onnx|peak_rss|train_classifier|timm|Session|Target|interleave|optimize"
)
"""Calls that take seconds when they are answered; they stay out of the quick sample."""
SAMPLE = 2


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own: a word may be the name of an output."""
    monkeypatch.chdir(tmp_path)


def faults(entry: Entry, folder: Path, some: int | None = None) -> list[str]:
    """What is wrong with the answers to all wrong calls, or to some drawn by a fixed seed."""
    made = list(trials(entry, folder))
    chosen = made if some is None else random.Random(entry.name).sample(made, some)
    found = []
    for argument, words, call, wrong in chosen:
        torch.manual_seed(0)
        if said := fault(call, wrong):
            found.append(f"{entry.name}({argument}: {words}): {said}")
    return found


@pytest.mark.filterwarnings("ignore")
def test_some_wrong_calls(tmp_path: Path) -> None:
    for i, entry in enumerate(ENTRIES):
        if not DEAR.search(entry.name):
            assert faults(entry, tmp_path / str(i), SAMPLE) == []


def test_every_public_function_is_tried() -> None:
    tried = {entry.name for entry in ENTRIES}
    assert {
        "build_model",
        "quantize",
        "export_onnx",
        "latency",
        "train",
        "DiT",
        "EMA.update",
    } <= tried
    assert len(tried) > 200
    with pytest.raises(AssertionError, match="new: say in OWN or RIGHT what thing may be"):
        public.arguments("new", lambda thing: thing)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name.replace(" ", "-"))
def test_every_wrong_call(entry: Entry, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    entry.answer(tmp_path / "good")
    assert faults(entry, tmp_path / "trials") == []


def test_a_fault_is_found() -> None:
    assert fault(lambda: int("x"), False) == (
        "ValueError: \"invalid literal for int() with base 10: 'x'\""
    )
    assert fault(lambda: 3, True) == "answered '3'"
    assert fault(lambda: 3, False) is None
    assert fault(lambda: torch.ones(2) @ torch.ones(3), False).startswith("RuntimeError")  # type: ignore[union-attr]
