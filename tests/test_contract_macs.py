"""Analytic multiply-adds equal traced ones, for every registered part."""

from __future__ import annotations

import pytest
from contract import (
    BLOCKS,
    FFNS,
    MIXERS,
    context_for,
    is_dynamic,
    macs_of,
    make_block,
    make_ffn,
    make_mixer,
    mixers,
    tokens,
)
from torch import nn

from effformer import registry
from effformer.context import Ledger
from effformer.profile import Counter

FORMS = [(n, False) for n in MIXERS] + [(n, True) for n in mixers(causal=True)]
CONDS = {"never": [False], "optional": [False, True], "always": [True]}
BLOCK_FORMS = [(n, c) for n in BLOCKS for c in CONDS[registry.block.get(n).caps.cond]]


def _operators(part: nn.Module, n: int, batch: int) -> int:
    x = tokens(n, batch)
    with Counter(part) as counter:
        part(x, context_for(part, x))
    return sum(tally.macs for tally in counter.rows.values())


def _traced(part: nn.Module, n: int) -> int:
    """Operators of one more sample; tables that the batch shares are no sample's work."""
    return _operators(part, n, 3) - _operators(part, n, 2)


@pytest.mark.parametrize("n", [7, 130])
@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_mixers(name: str, causal: bool, n: int) -> None:
    part = make_mixer(name, causal=causal)
    assert _traced(part, n) == macs_of(part, n)


@pytest.mark.parametrize("name", FFNS)
def test_ffns(name: str) -> None:
    part = make_ffn(name)
    assert _traced(part.train(is_dynamic(part)), 7) == part.macs(7)


@pytest.mark.parametrize("name", registry.ffn.names(dynamic=True))
def test_dynamic_ffns_execute_what_they_report(name: str) -> None:
    part, x, ledger = make_ffn(name), tokens(7, 3), Ledger()
    with Counter(part) as counter:
        part(x, context_for(part, x, ledger=ledger))
    executed = sum(tally.macs for tally in counter.rows.values())
    (fraction,) = ledger.executed.values()
    assert fraction.shape == (3,)
    assert round(float(fraction.sum()) * part.macs(7)) == executed


@pytest.mark.parametrize(("name", "cond"), BLOCK_FORMS)
def test_blocks(name: str, cond: bool) -> None:
    block = make_block(name, cond=cond)
    assert _traced(block.train(is_dynamic(block)), 7) == block.macs(7)
