"""Capabilities in pairs: what a part can do, it can do together, or it says that it cannot."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest
from contract import MIXERS, caps_of
from pairs import FIELDS, PAIRS, causal_rope, packed_rope, rope_streaming

from effformer.attention import Linear
from effformer.context import EMPTY, Context
from effformer.registry import Caps

APART = {"causal": True, "mask": "key"}
FACTS = {
    "cond", "dynamic", "cost", "front", "joint", "mixer_only", "multihead", "onnx", "order_free",
    "sequential", "time",
}  # fmt: skip
"""Of blocks and slots, or about the part as such: no field of a mixer's context."""


def able(name: str, cap: str) -> bool:
    if cap == "axes":
        return bool(caps_of(name).axes)
    return caps_of(name).satisfies(**{cap: APART.get(cap, True)})


def declare(pair: tuple[str, str]) -> list[str]:
    """Mixers that declare both; every cross-attention can be fed step by step."""
    wanted = ["cross"] if pair == ("cross", "streaming") else list(pair)
    return [name for name in MIXERS if all(able(name, cap) for cap in wanted)]


CASES = [(pair, name) for pair in PAIRS for name in declare(pair)]


@pytest.mark.parametrize(
    ("pair", "name"), CASES, ids=["-".join((*pair, name)) for pair, name in CASES]
)
def test_both_hold_together(pair: tuple[str, str], name: str) -> None:
    PAIRS[pair](name)


def test_every_pair_is_proved_or_refused() -> None:
    assert {f.name for f in fields(Caps)} == FACTS | set(FIELDS)
    assert set(PAIRS) <= set(combinations(FIELDS, 2))
    for pair in combinations(FIELDS, 2):
        assert bool(declare(pair)) == (pair in PAIRS), pair
