"""Work that a dynamic part skips equals what it reports; the work of dense parts is in their contract."""

from __future__ import annotations

import pytest
from contract import context_for, make_ffn, tokens

from effformer import registry
from effformer.context import Ledger
from effformer.profile import Counter


@pytest.mark.parametrize("name", registry.ffn.names(dynamic=True))
def test_dynamic_ffns_execute_what_they_report(name: str) -> None:
    part, x, ledger = make_ffn(name), tokens(7, 3), Ledger()
    with Counter(part) as counter:
        part(x, context_for(part, x, ledger=ledger))
    executed = sum(tally.macs for tally in counter.rows.values())
    (fraction,) = ledger.executed.values()
    assert fraction.shape == (3,)
    assert round(float(fraction.sum()) * part.macs(7)) == executed
