"""Wrong calls of public functions are answered rightly, or refused in a sentence of ours."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from . import flows
from .corpus import Entry, fault, trials

ENTRIES = flows.ENTRIES
SAMPLE = 2


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
    for i, entry in enumerate(flows.ENTRIES):
        assert faults(entry, tmp_path / str(i), SAMPLE) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name.replace(" ", "-"))
def test_every_wrong_call(entry: Entry, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    entry.call(**entry.good(tmp_path / "good"))
    assert faults(entry, tmp_path / "trials") == []


def test_a_fault_is_found() -> None:
    assert fault(lambda: int("x"), False) == (
        "ValueError: \"invalid literal for int() with base 10: 'x'\""
    )
    assert fault(lambda: 3, True) == "answered '3'"
    assert fault(lambda: 3, False) is None
    assert fault(lambda: torch.ones(2) @ torch.ones(3), False).startswith("RuntimeError")  # type: ignore[union-attr]
