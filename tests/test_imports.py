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
BASE = {"registry", "config", "context", "calls", "checks", "files", "layout", "version"}
TOP = BASE | {"io", "build", "dynamic", "inference"}
PARTS = {"nn", "attention", "ffn", "blocks"}
# what the modules of a group may import beside their own group, deferred imports included
ALLOWED: dict[str, set[str]] = {
    **{name: BASE for name in BASE},
    "": TOP | {"compress", "export", "flow", "models", "profile", "train"},
    "build": BASE,
    "io": BASE | {"compress"},  # load_model replays quantization
    "dynamic": BASE | PARTS,
    "inference": BASE | PARTS,
    "nn": BASE,
    "attention": BASE | {"nn"},
    "ffn": BASE | {"nn"},
    "blocks": BASE | {"nn", "attention", "ffn"},
    "models": BASE | PARTS,
    "flow": {"checks", "registry", "config"},
    "profile": BASE,
    "train": TOP | {"flow", "profile", "nn"},
    "compress": TOP | PARTS | {"profile"},
    "export": TOP | PARTS | {"profile", "compress.quant"},
    "cli": TOP | PARTS | {"models", "flow", "profile", "train", "compress", "export"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


def imported(name: str, path: Path) -> Iterator[str]:
    """Names of our modules that a module imports at run time (not for type checkers only)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            plain = base == "effformer" or base in FOLDERS
            yield from (f"{base}.{alias.name}" if plain else base for alias in node.names)


def group(name: str) -> str:
    """Second component: "effformer.nn.rope" -> "nn"; "" for the package itself."""
    return [*name.split("."), ""][1]


@pytest.mark.parametrize("name", [name for name, _ in modules()])
def test_import_direction(name: str) -> None:
    path = dict(modules())[name]
    own = group(name)
    assert own in ALLOWED, f"{name} belongs to no group; say here what it may import"
    for target in imported(name, path):
        if target.split(".")[0] not in ("effformer", "models", "compress", "export"):
            continue
        assert target.startswith("effformer"), f"{name} imports {target}: write effformer.{target}"
        if group(target) == own:
            continue
        permitted = any(f"{target}.".startswith(f"effformer.{a}.") for a in ALLOWED[own])
        assert permitted, (
            f"{name} imports {target}; {own or 'effformer'} may import {sorted(ALLOWED[own])}"
        )


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
