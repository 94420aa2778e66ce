"""Budgets of the house: a commit that changes a number here argues for it."""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import effformer
from effformer.attention import Flow
from effformer.cli.main import app
from effformer.context import Context
from effformer.registry import KINDS, Caps
from effformer.site import Layer, Needs, Site

ROOT = Path(__file__).resolve().parent.parent
FIVE = (Site, Context, Caps, Needs, Layer)
FIELDS = 61
REGISTRIES = 13
FILES_OF_A_BLOCK = 8
MOVES_OF_A_NAME = 55
CHECKS = ("arguments.py", "values.py", "checks.py")
"""Files that only look at what a call was given; a reader does not follow them."""

SHARED = {
    "causal": "tokens do not see later ones",
    "cond": "the conditioning vector",
    "cross": "attending to a memory",
    "front": "tokens that stand before the grid",
    "grid": "layout of the tokens",
    "joint": "two streams in one attention",
    "mask": "which tokens may be attended to",
    "rope": "rotary tables",
    "time": "the embedding of the time",
    "width": "which heads and channels run",
}
"""Names of fields that occur in several of the five, each with its one meaning."""


def fields_of(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def test_what_travels_and_what_is_decided_have_few_fields() -> None:
    assert sum(len(fields_of(cls)) for cls in FIVE) <= FIELDS


def test_a_name_has_one_meaning() -> None:
    counts = Counter(name for cls in FIVE for name in fields_of(cls))
    assert {name for name, count in counts.items() if count > 1} == set(SHARED)


def test_registries_are_few() -> None:
    assert len(KINDS) <= REGISTRIES


def test_nobody_asks_for_the_config_class_of_another_file() -> None:
    """Whoever does knows a part by its class, and every new part would have to be told to it."""
    found = []
    for folder in ("effformer", "models", "compress", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            own = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
            for call in ast.walk(tree):
                if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "isinstance"):
                    continue
                asked = ast.unparse(call.args[1])
                if asked.endswith(".Config") and asked.partition(".")[0] not in {*own, "_family"}:
                    found.append(f"{path.relative_to(ROOT)}:{call.lineno} {asked}")
    assert not found


def test_a_block_is_read_in_few_files() -> None:
    """Files that one forward pass of a DiT block enters."""
    model = effformer.build_model("dit-nano").eval()
    ctx = Context(cond=torch.randn(1, 48), time=torch.randn(1, 48), grid=(2, 2))
    x, entered = torch.randn(1, 4, 48), set()

    def note(frame: FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename)
        if (
            event == "call"
            and file.is_relative_to(ROOT)
            and not file.is_relative_to(ROOT / "tests")
        ):
            entered.add(file.relative_to(ROOT))

    model.blocks[0](x, ctx)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        model.blocks[0](x, ctx)
    finally:
        sys.setprofile(before)
    assert 0 < len(entered) <= FILES_OF_A_BLOCK, sorted(entered)


def test_a_name_reaches_its_core_in_few_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes of file between calls, from a word on the command line to the core that it names."""
    entered: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename)
        ours = file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "tests")
        if event == "call" and ours and file.name not in CHECKS:
            entered.append(str(file))

    def built(*_: object) -> None:
        sys.setprofile(before)
        raise typer.Exit

    words = ["build", "dit-nano", "--attn", "flow", "--set", "depth=1"]
    CliRunner().invoke(app, [*words, "-o", str(tmp_path / "a")])  # everything is imported
    monkeypatch.setattr(Flow, "__init__", built)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        CliRunner().invoke(app, [*words, "-o", str(tmp_path / "b")])
    finally:
        sys.setprofile(before)
    moves = sum(a != b for a, b in pairwise(entered))
    assert 0 < moves <= MOVES_OF_A_NAME
