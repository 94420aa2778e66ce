from __future__ import annotations

from pathlib import Path

import pytest

from .running import SMALL, invoke


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small saved model."""
    folder = tmp_path_factory.mktemp("models") / "small"
    invoke("build", "sit-nano", *SMALL, "--attn", "flow", "-o", str(folder))
    return folder
