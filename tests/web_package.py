"""A package that looks like onnxruntime-web, without the 14 MB in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effformer.export.web import BINARY, LOADER

__all__ = ["package"]


def package(folder: Path, **changes: Any) -> Path:
    """Write one into a new folder, with other facts in its package.json if given."""
    (folder / "dist").mkdir(parents=True)
    for name in (LOADER, BINARY):
        (folder / "dist" / name).write_text(f"/*! the authors */\n{name}")
    facts = {"name": "onnxruntime-web", "version": "1.30.0", "license": "MIT"} | changes
    (folder / "package.json").write_text(json.dumps(facts))
    return folder
