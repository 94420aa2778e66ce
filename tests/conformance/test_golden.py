"""One test per golden set found in ``--golden`` (default: the sets in tests/golden)."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Golden, adapter_for


def test_golden_set(golden_path: Path) -> None:
    adapter = adapter_for(golden_path.stem)
    if adapter is None:
        pytest.skip("not implemented")
    golden = Golden.read(golden_path)
    with golden.precision():
        adapter(golden)
