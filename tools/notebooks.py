"""Write examples/notebooks from docs/tutorials: one source for a page and the notebook of it.

A fenced block of Python becomes a cell; everything else, commands of the shell included, stays text.

Usage: python tools/notebooks.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS, NOTEBOOKS = ROOT / "docs" / "tutorials", ROOT / "examples" / "notebooks"
_SITE = "https://github.com/effformer/effformer/blob/main/docs"


def cells(text: str) -> Iterator[tuple[str, str]]:
    """Kind and source of every cell."""
    for i, piece in enumerate(re.split(r"^```python\n(.*?)^```\n", text, flags=re.S | re.M)):
        if piece.strip():
            yield ("code" if i % 2 else "markdown"), piece.strip("\n")


def notebook(text: str) -> str:
    """A notebook of a page; links to other pages lead to where those can be read."""
    made: list[dict[str, Any]] = []
    for i, (kind, source) in enumerate(cells(text)):
        if kind == "markdown":
            source = re.sub(r"\]\(\.\./([\w./-]+)\)", rf"]({_SITE}/\1)", source)
            source = re.sub(r"\]\((\w+\.md)\)", rf"]({_SITE}/tutorials/\1)", source)
        lines = source.splitlines(keepends=True)
        cell: dict[str, Any] = {
            "cell_type": kind,
            "id": f"cell-{i}",
            "metadata": {},
            "source": lines,
        }
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    facts = {"kernelspec": kernel, "language_info": {"name": "python"}}
    book = {"cells": made, "metadata": facts, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def pages() -> dict[Path, str]:
    """Every notebook with what it should hold."""
    return {
        NOTEBOOKS / f"{page.stem}.ipynb": notebook(page.read_text(encoding="utf-8"))
        for page in sorted(TUTORIALS.glob("*.md"))
    }


def main(arguments: list[str]) -> int:
    """Write the notebooks, or with ``--check`` compare them; 1 means that one is out of date."""
    every = pages()
    if arguments == ["--check"]:
        there = {path: path.read_text(encoding="utf-8") for path in NOTEBOOKS.glob("*.ipynb")}
        if there != every:
            print("examples/notebooks is out of date: python tools/notebooks.py")
        return int(there != every)
    NOTEBOOKS.mkdir(exist_ok=True)
    for path, text in every.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
