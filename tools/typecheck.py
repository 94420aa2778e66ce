"""Type-check the source folders as the one package that they install as.

Type checkers do not follow setuptools' ``package-dir``. So this links the four folders into a
temporary ``effformer/`` tree, runs mypy there with the options of pyproject.toml, and maps the
paths in its answer back.

Usage: python tools/typecheck.py [mypy options]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("models", "compress", "export")


def link_tree(target: Path) -> None:
    """Fill ``target`` with links, so that it looks like the installed packages."""
    package = target / "effformer"
    package.mkdir()
    for source in (ROOT / "effformer").iterdir():
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    for name in MAPPED:
        (package / name).symlink_to(ROOT / name)
    (target / "tools").symlink_to(ROOT / "tools")


def check(options: list[str]) -> int:
    """Run mypy over the tree; returns its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        link_tree(Path(folder))
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), *options, "effformer", "tools"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    for line in done.stdout.splitlines():
        path = line.removeprefix("effformer/")
        print(path if path.startswith(MAPPED) else line)
    return done.returncode


if __name__ == "__main__":
    sys.exit(check(sys.argv[1:]))
