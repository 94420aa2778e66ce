"""A package that `effformer new` writes passes its own tests, and is known once it is installed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from effformer import registry
from effformer.checks import FormatError
from effformer.testing import new_package
from effformer.testing.check import CHECKS
from effformer.testing.packages import STARTS
from effformer.testing.report import found
from effformer.testing.subjects import subjects

SLOW = ("compiles-without-graph-breaks", "one-graph-serves-every-length", "its-graph-agrees")


@pytest.mark.parametrize("kind", STARTS)
def test_what_is_written_keeps_the_contract(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, module = f"my-own-{kind}", f"effformer_my_own_{kind}"
    folder = new_package(kind, name, tmp_path / "package")
    monkeypatch.syspath_prepend(str(folder))
    for each in registry.KINDS.values():  # what is registered here ends with the test
        assert each.names() is not None
        monkeypatch.setattr(each, "_entries", dict(each._entries))
        monkeypatch.setattr(each, "_aliases", dict(each._aliases))
    importlib.import_module(module)
    tests = folder / "tests" / f"test_my_own_{kind}.py"
    known: dict[str, object] = {}
    exec(compile(tests.read_text(), str(tests), "exec"), known)
    for case in ("test_equation", "test_in_a_model"):
        known[case]()  # type: ignore[operator]
    for subject in subjects(kind, name):
        for check in CHECKS:
            if check.name not in SLOW and check.applies(subject):
                finding = found(check, subject)
                assert finding.outcome == "holds", str(finding)
    for loaded in [m for m in sys.modules if m.startswith(module)]:
        del sys.modules[loaded]


@pytest.mark.slow
@pytest.mark.parametrize("kind", STARTS)
def test_it_installs_and_passes_its_own_tests(kind: str, tmp_path: Path) -> None:
    folder, site = new_package(kind, "own-part", tmp_path / "package"), tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(folder)], check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import effformer\n"
        f"print(effformer.build_model('vit-nano', {STARTS[kind]}='own-part').config)\n"
        "import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_nothing_of_an_author_is_replaced(tmp_path: Path) -> None:
    folder = new_package("ffn", "squared", tmp_path / "package")
    part = folder / "effformer_squared" / "part.py"
    part.write_text("mine")
    with pytest.raises(FormatError, match="holds files already; choose an empty or new folder"):
        new_package("ffn", "squared", folder)
    assert part.read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("model", "x", "unknown kind 'model'"),
        ("ffn", "mlp", "there is ffn 'mlp' already"),
        ("attention", "flow", "there is attention 'flow' already"),
        ("ffn", "My_FFN", "lower-case words joined by hyphens"),
        ("ffn", "../x", "lower-case words joined by hyphens"),
        ("ffn", "", "lower-case words joined by hyphens"),
    ],
)
def test_wrong_words_are_refused(kind: str, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        new_package(kind, name, tmp_path / "package")
    assert not list(tmp_path.iterdir())
