"""Hooks of mkdocs: where the site finds the docstrings."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "site-source"  # mkdocs.yml names it


def on_startup(**_: Any) -> None:
    """Copy the four source folders together as the one package that they install as: the collector of
    docstrings follows neither setuptools' ``package-dir`` nor links out of a package.
    """
    shutil.rmtree(TREE, ignore_errors=True)
    own = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "effformer", TREE / "effformer", ignore=own)
    for name in ("models", "compress", "export"):
        shutil.copytree(ROOT / name, TREE / "effformer" / name, ignore=own)
    for path in TREE.rglob("*.py"):  # its name of the section with code
        text = path.read_text(encoding="utf-8")
        path.write_text(
            re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M), encoding="utf-8"
        )
