"""Who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"effformer": ROOT / "effformer"} | {
    f"effformer.{name}": ROOT / name for name in ("models", "compress", "export")
}
BASE = {
    "arguments", "registry", "config", "context", "calls", "checks", "files", "layout", "ledger", "notebook", "places", "retired", "site", "values", "version",
    "wrapped",
}  # fmt: skip
READ = {"lazy", "loading", "pickled", "shards", "weights"}  # files of weights
TOP = BASE | READ | {"io", "build", "convert"}
PARTS = {"nn", "attention", "ffn", "blocks"}
# what the modules of a group may import beside their own group, deferred imports included
ALLOWED: dict[str, set[str]] = {
    **{name: BASE for name in BASE},
    "__main__": {"cli"},
    "": TOP | {"compress", "export", "flow", "models", "profile", "testing", "train"},
    "build": BASE,
    **{name: BASE | READ for name in READ},
    "io": BASE | READ,
    "convert": BASE | READ | {"io"},
    "nn": BASE,
    "attention": BASE | {"nn"},
    "ffn": BASE | {"nn"},
    "blocks": BASE | {"nn", "attention", "ffn"},
    "models": BASE | PARTS,
    "flow": {"arguments", "notebook", "wrapped", "checks", "registry", "config", "values"},
    "profile": BASE,
    "cache": BASE | PARTS | {"flow", "profile"},
    "train": TOP | {"flow", "profile", "nn"},
    "compress": TOP | PARTS | {"flow", "profile", "train"},
    "export": TOP | PARTS | {"cache", "flow", "profile", "compress.quant", "compress.samples"},
    "testing": TOP | PARTS | {"profile", "export"},
    "cli": TOP
    | PARTS
    | {"models", "cache", "flow", "profile", "testing", "train", "compress", "export"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


def statements(tree: ast.AST, *, deferred: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run: not those for type checkers only, and those inside functions
    only if ``deferred``.
    """
    if isinstance(tree, (ast.Import, ast.ImportFrom)):
        yield tree
        return
    if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)) and not deferred:
        return
    types_only = isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING"
    inside = tree.orelse if types_only else ast.iter_child_nodes(tree)
    for node in inside:
        yield from statements(node, deferred=deferred)


def imported(name: str, path: Path, *, deferred: bool = True) -> Iterator[tuple[str, str]]:
    """(module, name in it or "") for what a module imports at run time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(tree, deferred=deferred):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
            continue
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        yield from ((base, alias.name) for alias in node.names)


def group(name: str) -> str:
    """Second component: "effformer.nn.rope" -> "nn"; "" for the package itself."""
    return [*name.split("."), ""][1]


@pytest.mark.parametrize("name", [name for name, _ in modules()])
def test_import_direction(name: str) -> None:
    path = dict(modules())[name]
    own = group(name)
    assert own in ALLOWED, f"{name} belongs to no group; say here what it may import"
    for base, inside in imported(name, path):
        plain = inside and (base == "effformer" or base in FOLDERS)
        target = f"{base}.{inside}" if plain else base
        if target.split(".")[0] not in ("effformer", "models", "compress", "export"):
            continue
        assert target.startswith("effformer"), f"{name} imports {target}: write effformer.{target}"
        if group(target) == own:
            continue
        permitted = any(f"{target}.".startswith(f"effformer.{a}.") for a in ALLOWED[own])
        assert permitted, (
            f"{name} imports {target}; {own or 'effformer'} may import {sorted(ALLOWED[own])}"
        )


def file_graph(*, deferred: bool) -> dict[str, set[str]]:
    """File -> files that it imports by name. That a module first runs the ``__init__`` of the
    packages above it is no edge: those only collect names.
    """
    known = dict(modules())
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        pairs = imported(name, path, deferred=deferred)
        targets = (f"{a}.{b}" if f"{a}.{b}" in known else a for a, b in pairs)
        graph[name] = {target for target in targets if target in known} - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of files that import each other, directly or over others."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    return {
        frozenset({name, *(other for other in reach[name] if name in reach[other])})
        for name in graph
        if name in reach[name]
    }


def test_statements_that_run_are_found() -> None:
    source = """
import a
if TYPE_CHECKING:
    import b
else:
    import c
try:
    import d
except ImportError:
    pass
class Holder:
    from e import f
    def method(self):
        import g
"""
    tree = ast.parse(source)
    for deferred, expected in ((False, "acde"), (True, "acdeg")):
        found = statements(tree, deferred=deferred)
        names = [n.names[0].name if isinstance(n, ast.Import) else n.module for n in found]
        assert names == list(expected)


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, ["ab"]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d", "a"}}, ["abc", "de"]),
    ],
)
def test_circles_are_found(graph: dict[str, set[str]], found: list[str]) -> None:
    assert circles(graph) == {frozenset(names) for names in found}


# circles of files, and why each may stay
CIRCLES: dict[frozenset[str], str] = {}


@pytest.mark.parametrize("deferred", [False, True], ids=["at the top", "in functions as well"])
def test_no_circle_of_files(deferred: bool) -> None:
    """Also an import inside a function ties two files together."""
    graph = file_graph(deferred=deferred)
    assert sum(map(len, graph.values())) > 500
    found = circles(graph) - set(CIRCLES)
    assert not found, [sorted(circle) for circle in found]


@pytest.mark.parametrize(
    "name", [name for name, path in modules() if path.parent in FOLDERS.values()]
)
def test_mapped_folders_import_the_core_absolutely(name: str) -> None:
    path = dict(modules())[name]
    if path.parent == ROOT / "effformer":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    deep = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level > 1]
    assert not deep, f"{path.name} line {deep}: a relative import leaves the folder"


def run(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("folder", ["models", "compress", "export"])
def test_mapped_folders_refuse_their_bare_name(folder: str) -> None:
    done = run(f"import {folder}")
    assert done.returncode == 1
    assert f"ImportError: import effformer.{folder}" in done.stderr


def test_import_is_light() -> None:
    """`import effformer` loads nothing; building a model loads torch and no optional package."""
    heavy = "onnx onnxruntime onnxscript timm diffusers matplotlib bitsandbytes fvcore torchvision"
    done = run(
        "import sys, effformer\n"
        "assert 'torch' not in sys.modules\n"
        "effformer.build_model('dit-nano')\n"
        f"print([m for m in {[*heavy.split(), 'rich', 'typer']} if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_does_not_import_torch() -> None:
    done = run(
        "import sys\n"
        "from effformer.cli.main import main\n"
        "sys.argv = ['effformer', '--help']\n"
        "try:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_saving_a_config_imports_nothing() -> None:
    """A config knows its entry: nobody has to walk the registries for it."""
    done = run(
        "import sys, effformer\n"
        "model = effformer.build_model('vit-nano', attn='flow', tokens='dynamic')\n"
        "before = set(sys.modules)\n"
        "assert model.config.to_dict()['attn']['core']['name'] == 'flow'\n"
        "print(sorted(set(sys.modules) - before))"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
