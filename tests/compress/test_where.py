"""Glob patterns of module paths."""

from __future__ import annotations

import pytest
from effformer.compress.where import check, covers, patterns

PATHS = ["blocks", "blocks.0", "blocks.0.ffn", "blocks.0.ffn.fc1", "blocks.10.ffn.fc1", "head"]


@pytest.mark.parametrize(
    ("given", "covered"),
    [
        ("*", PATHS),
        ("blocks", PATHS[:5]),
        ("blocks.0", PATHS[1:4]),
        ("*.ffn", PATHS[2:5]),
        (["blocks.1?", "head"], PATHS[4:]),
        ("ffn", []),
        ("HEAD", []),
        ([], []),
    ],
)
def test_a_pattern_covers_what_is_below_a_match(given: str | list[str], covered: list[str]) -> None:
    assert [path for path in PATHS if covers(given, path)] == covered


def test_one_pattern_or_several() -> None:
    assert patterns("a.*") == ("a.*",)
    assert patterns(["a", "b"]) == ("a", "b")


def test_a_pattern_that_covers_nothing_is_refused() -> None:
    able = ["blocks.0.ffn.fc1", "blocks.10.ffn.fc1"]
    check(["blocks.*", "*.fc1"], PATHS, able=able, what="layer", where="verb: where")
    with pytest.raises(
        ValueError, match=r"^verb: where='blocks.\*.fnn' matches no module; .*blocks.0.ffn"
    ):
        check("blocks.*.fnn", PATHS, able=able, what="layer", where="verb: where")
    with pytest.raises(ValueError, match="'head' matches modules, but no layer is in them"):
        check(["blocks", "head"], PATHS, able=able, what="layer", where="verb: skip")
