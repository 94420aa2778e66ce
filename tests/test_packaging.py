"""The package list is the tree, and a wheel works where there is no checkout."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = ("effformer", "models", "compress", "export")


def test_package_list_is_the_tree() -> None:
    found = set()
    for source in SOURCES:
        for init in (ROOT / source).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            found.add(".".join(parts if source == "effformer" else ("effformer", *parts)))
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found)


SHIPPED = {"PIL": "pillow", "onnx_ir": "onnxscript", "yaml": "pyyaml"}
"""Modules whose package has another name."""


def needed() -> list[tuple[str, str, str | None]]:
    """(file, module, extra) of everything that is imported where it is used."""
    calls = []
    for path in (path for name in SOURCES for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "need":
                words = [ast.literal_eval(arg) for arg in node.args]
                words += [ast.literal_eval(k.value) for k in node.keywords if k.arg == "extra"]
                calls.append((str(path.relative_to(ROOT)), words[0], (*words[1:], None)[0]))
    return calls


def test_what_is_needed_is_installed_by_what_the_message_names() -> None:
    project, found = PROJECT["project"], needed()
    assert len(found) > 30
    for file, module, extra in found:
        top = module.partition(".")[0]
        name = SHIPPED.get(top, top)
        lists = project["optional-dependencies"]
        listed = project["dependencies"] if extra is None else lists.get(extra, [])
        assert any(re.match(rf"{name}\b", one) for one in listed), (file, module, extra)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree (building in the tree would leave files there)."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(out), str(copy)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("effformer-*.whl")
    return built


def test_wheel_holds_what_it_needs(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "effformer/py.typed" in names
    assert "effformer/train/data/digits.safetensors" in names
    page = {f"effformer/export/web/{path.name}" for path in (ROOT / "export/web").iterdir()}
    assert page <= set(names)
    assert any(n.endswith("LICENSE") for n in names)
    top = {n.split("/")[0] for n in names}
    assert {n for n in top if not n.endswith(".dist-info")} == {"effformer"}
    sources = {str(p.relative_to(ROOT)) for s in SOURCES for p in (ROOT / s).rglob("*.py")}
    installed = {s if s.startswith("effformer/") else f"effformer/{s}" for s in sources}
    assert {n for n in names if n.endswith(".py")} == installed


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    code = (
        "import effformer, effformer.models, effformer.compress, effformer.export\n"
        "from effformer.train import load_data\n"
        "print(effformer.__file__)\n"
        "model = effformer.build_model('sit-nano', attn='flow')\n"
        "print(type(model).__module__, len(load_data('digits')), effformer.__version__)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    place, facts = done.stdout.splitlines()
    assert Path(place).is_relative_to(target)
    assert facts.split()[:2] == ["effformer.models.sit", "1797"]
