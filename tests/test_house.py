"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("effformer", "models", "compress", "export", "tools")
SOURCES = sorted(p for name in OURS for p in (ROOT / name).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 600, 60


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_source_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = []
    if path.stem in ("utils", "helpers", "misc"):
        found.append("a file's name says what is in it")
    if len(text.splitlines()) > LONGEST_FILE:
        found.append(f"{len(text.splitlines())} lines, the limit is {LONGEST_FILE}")
    if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text):
        found.append("unfinished work is tracked outside the code")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found += _function(node)
        if isinstance(node, ast.ExceptHandler) and _swallows(node):
            found.append(f"line {node.lineno}: a bare except hides errors")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")
            if safe != "True":
                found.append(f"line {node.lineno}: torch.load needs weights_only=True")
        if isinstance(node, ast.Name) and node.id == "NotImplementedError" and _raised(tree, node):
            found.append(f"line {node.lineno}: a stub")
    assert not found, "\n".join(found)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Length without the docstring, which may be as long as its mathematics."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    end = node.end_lineno or node.lineno
    length = end - body[0].lineno + 1
    if length <= LONGEST_FUNCTION:
        return []
    return [f"line {node.lineno}: {node.name} has {length} lines, the limit is {LONGEST_FUNCTION}"]


def _swallows(node: ast.ExceptHandler) -> bool:
    """Neither raised again nor said."""
    broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
    said = ("warnings.warn",)
    return broad and not any(
        isinstance(inner, ast.Raise)
        or (isinstance(inner, ast.Call) and ast.unparse(inner.func) in said)
        for inner in ast.walk(node)
    )


def _raised(tree: ast.Module, name: ast.Name) -> bool:
    raises = [n for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc is not None]
    return any(name in ast.walk(n) for n in raises)


@pytest.mark.parametrize("path", TESTS, ids=names(TESTS))
def test_comparisons_are_asserted(path: Path) -> None:
    """`torch.allclose(a, b)` on a line of its own tests nothing."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    idle = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).endswith(("allclose", ".equal", "isclose"))
    ]
    assert not idle, f"lines {idle}"
