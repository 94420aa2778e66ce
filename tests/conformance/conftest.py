from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SLOW = ("sampling-cost",)
"""Sets that count models of 28 blocks, operator by operator; `.ci/run` asks for them by name."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_path" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden"))
        paths = sorted(folder.glob("*.json"))
        if not paths:
            raise pytest.UsageError(f"--golden {folder}: no golden sets (*.json) there")
        metafunc.parametrize("golden_path", [_case(path) for path in paths])


def _case(path: Path) -> Any:
    marks = [pytest.mark.slow] if path.stem in SLOW else []
    return pytest.param(path, id=path.stem, marks=marks)
