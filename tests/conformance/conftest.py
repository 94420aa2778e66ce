from __future__ import annotations

from pathlib import Path

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_path" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden"))
        paths = sorted(folder.glob("*.json"))
        if not paths:
            raise pytest.UsageError(f"--golden {folder}: no golden sets (*.json) there")
        metafunc.parametrize("golden_path", paths, ids=[p.stem for p in paths])
