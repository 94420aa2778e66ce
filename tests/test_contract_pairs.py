"""Capabilities in pairs: what a part can do, it can do together, or it says that it cannot."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest
import torch
from contract import DIM, MIXERS, caps_of
from torch import Tensor

from effformer.attention import Linear
from effformer.checks import CapabilityError
from effformer.config import resolve
from effformer.context import Context, Rope
from effformer.registry import Caps
from effformer.testing.pairs import FIELDS, PAIRS, able, causal_rope, draw, part_of, rope_streaming

FACTS = {
    "cond", "dynamic", "cost", "front", "joint", "mixer_only", "multihead", "order_free",
    "sequential", "time",
}  # fmt: skip
"""Of blocks and slots, or about the part as such: no field of a mixer's context."""


def declare(pair: tuple[str, str]) -> list[str]:
    return [name for name in MIXERS if able(caps_of(name), pair)]


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


HEADS = {
    "gate": {"gate": "element"},
    "gate-head": {"gate": {"per": "head", "norm": "head", "first": True}},
    "conv": {"short_conv": 3},
    "norm": {"qk_norm": True},
    "values": {"kv_heads": 1},
}
"""Options of the heads around a core."""


def _options() -> list[tuple[str, tuple[str, str], str]]:
    """What heads with an option still declare; heads that share keys cannot be cut."""
    cases = []
    for option, knobs in HEADS.items():
        for name in ("softmax", "linear"):
            caps = resolve("attention", {"name": name, **knobs}).caps()
            for pair in PAIRS:
                if able(caps, pair) and not (option == "values" and "width" in pair):
                    cases.append((option, pair, name))
    return cases


OPTIONED = _options()


@pytest.mark.parametrize(
    ("option", "pair", "name"), OPTIONED, ids=["-".join((o, *p, n)) for o, p, n in OPTIONED]
)
def test_options_of_heads_keep_it_so(option: str, pair: tuple[str, str], name: str) -> None:
    PAIRS[pair](name, options=HEADS[option])


def test_a_convolution_takes_no_memory_no_pairs_and_no_merged_tokens() -> None:
    with pytest.raises(CapabilityError, match="a memory has others; short_conv=0 would do"):
        part_of("softmax", options={"short_conv": 3}, memory_dim=DIM)
    part, pairs = (
        part_of("softmax", options={"short_conv": 3}),
        torch.ones(2, 1, 9, 9, dtype=torch.bool),
    )
    with pytest.raises(CapabilityError, match="cannot honour mask=full"):
        part(draw(), Context(mask=pairs))
    assert not part.caps.order_free
    assert not part.caps.sizes


ROTARY = [
    (prove, name) for pair, prove in PAIRS.items() if "rope" in pair for name in declare(pair)
]


@pytest.mark.parametrize(
    ("prove", "name"), ROTARY, ids=[f"{prove.__name__}-{name}" for prove, name in ROTARY]
)
def test_a_part_that_ignored_its_tables_would_fail(
    prove: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("query", "key"):
        monkeypatch.setattr(Rope, side, lambda self, x: x)
    with pytest.raises(AssertionError):
        prove(name)


@pytest.mark.parametrize("prove", [causal_rope, rope_streaming])
def test_a_causal_form_that_ignored_its_tables_would_fail(
    prove: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = Linear._scan

    def plain(self: Linear, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        mask, _, state = rest
        return scan(self, q, k, v, mask, None, state)

    monkeypatch.setattr(Linear, "_scan", plain)
    with pytest.raises(AssertionError):
        prove("linear")
