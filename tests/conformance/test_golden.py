"""One test per golden set found in ``--golden`` (default: the sets in tests/golden)."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Golden, adapter_for, adapter_names


def test_golden_set(golden_path: Path) -> None:
    adapter = adapter_for(golden_path.stem)
    if adapter is None:
        pytest.skip("not implemented")
    golden = Golden.read(golden_path)
    with golden.precision():
        adapter(golden)


def test_the_longest_name_wins() -> None:
    assert "dit" in adapter_names()
    assert adapter_for("dit_nosigma") is not None
    assert adapter_for("no-such-system") is None
