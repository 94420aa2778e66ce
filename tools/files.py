"""Refuse trailing whitespace, missing final newlines, merge markers and files over 500 kB.

Golden sets are copies of measurements and stay as they are.

Usage: python tools/files.py [FILE ...]; without files: everything that git tracks.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LARGEST = 500_000
TEXT = {".cfg", ".html", ".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
GOLDEN = "tests/golden/"
MARKERS = ("<" * 7 + " ", ">" * 7 + " ")


def complaints(path: Path) -> Iterator[str]:
    """What is wrong with one file."""
    if (size := path.stat().st_size) > LARGEST:
        yield f"{path}: {size:,} bytes, the limit is {LARGEST:,}"
    if path.suffix not in TEXT:
        return
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        if line != line.rstrip():
            yield f"{path}:{number}: trailing whitespace"
        if line.startswith(MARKERS):
            yield f"{path}:{number}: merge marker"
    if text and not text.endswith("\n"):
        yield f"{path}: no newline at the end"
    if "\r" in text:
        yield f"{path}: carriage returns"


def main(arguments: list[str]) -> int:
    """Check the files; 1 if there is anything to complain about."""
    if not arguments:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], stdout=subprocess.PIPE, text=True, check=True
        )
        arguments = listed.stdout.split("\0")[:-1]
    chosen = [Path(name) for name in arguments if not name.startswith(GOLDEN)]
    found = [c for path in chosen if path.is_file() for c in complaints(path)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
