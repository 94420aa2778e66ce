"""A package with a part in it, as its author starts: written from texts, and passing its own tests."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from effformer import registry
from effformer.arguments import checked
from effformer.checks import FormatError, shown, unknown
from effformer.files import atomic_folder
from effformer.version import VERSION

__all__ = ["STARTS", "new_package"]

STARTS = {"attention": "attn", "ffn": "ffn", "block": "block"}
"""Kinds of parts that a package can start with, and the keyword of `build_model` that takes them."""
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@checked
def new_package(kind: str, name: str, folder: str | Path | None = None) -> Path:
    """Write a package that adds a part of its own: entry point, part, tests, all of which pass.

    The part is a small one that works; its equation, its capabilities and its tests are replaced by the
    author's. Once installed, ``attn="name"`` works everywhere, the command line included.

    Args:
        kind: "attention", "ffn" or "block".
        name: of the part, lower-case words joined by hyphens.
        folder: where to, new or empty; None for ``effformer-<name>`` here.

    Returns:
        The folder.

    Raises:
        ValueError: another kind, or a name that is taken or not of that form.
        FormatError: something is there already.

    Example:
        >>> sorted(p.name for p in new_package("ffn", "squared").iterdir())
        ['README.md', 'effformer_squared', 'pyproject.toml', 'tests']
    """
    if kind not in STARTS:
        raise unknown("kind", kind, [*STARTS], where="new")
    if not _NAME.fullmatch(name) or len(name) > 60:
        raise ValueError(
            f"new: names are lower-case words joined by hyphens, such as 'cosine-window', got {shown(name)}"
        )
    if name in registry.KINDS[kind]:
        raise ValueError(f"new: there is {kind} {name!r} already; choose another name")
    words = name.split("-")
    title = {"attention": "Attention", "ffn": "FFN", "block": "Block"}[kind]
    file = "_".join(words)
    facts = {
        "kind": kind, "name": name, "slot": STARTS[kind], "package": f"effformer-{name}", "version": VERSION,
        "module": f"effformer_{file}", "file": "part", "cls": "".join(w.capitalize() for w in words) + title,
    }  # fmt: skip
    place = Path(facts["package"] if folder is None else folder)
    if place.is_dir() and any(place.iterdir()):
        raise FormatError(f"{place}: holds files already; choose an empty or new folder")
    with atomic_folder(place, marker="pyproject.toml") as temporary:
        for path, sources in _texts(kind, facts["module"], file).items():
            text = "".join(_source(source) for source in sources)
            (temporary / path).parent.mkdir(exist_ok=True)
            (temporary / path).write_text(Template(text).substitute(facts), encoding="utf-8")
    return place


def _texts(kind: str, module: str, file: str) -> dict[str, tuple[str, ...]]:
    """Path in the package -> the texts that it is made of."""
    return {
        "pyproject.toml": ("pyproject.toml",),
        "README.md": ("README.md",),
        f"{module}/__init__.py": ("__init__.py",),
        f"{module}/part.py": (f"{kind}.py",),
        f"tests/test_{file}.py": ("test.py", f"{kind}.test"),
    }


def _source(name: str) -> str:
    return (files(__package__) / "skeleton" / f"{name}.txt").read_text(encoding="utf-8")
