"""What the documentation says is true: examples run, links lead somewhere, lists are current."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import effformer
from effformer.version import VERSION

ROOT = Path(__file__).resolve().parent.parent
FILES = "https://github.com/effformer/effformer/blob/main/"
"""Where pages of the site find files that are no pages."""
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
PACKAGES = ("", ".models", ".compress", ".export")
LARGEST_LINES, LARGEST_FUNCTION = 600, 60


def module_names() -> list[str]:
    names = ["effformer"]
    for suffix in PACKAGES:
        package = importlib.import_module(f"effformer{suffix}")
        found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names += [package.__name__, *(info.name for info in found)]
    return sorted(set(names))


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    known = {**vars(module), "effformer": effformer, "torch": torch}
    report: list[str] = []
    for case in doctest.DocTestFinder(exclude_empty=True).find(module, globs=known):
        runner.run(case, out=report.append)
    assert runner.failures == 0, "".join(report)


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


APART = ("families", "tutorials")  # lines that other tests run, and pages that run as notebooks
PYTHON = [(p, code) for p in PAGES if p.parent.name not in APART for code in blocks(p, "python")]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize(
    ("page", "code"), PYTHON, ids=[f"{p.name}-{i}" for i, (p, _) in enumerate(PYTHON)]
)
def test_code_blocks_run(
    page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = effformer.registry.KINDS.values()
    assert all(list(kind) for kind in kinds)  # loads what is built in
    for kind in kinds:  # parts that an example registers end with it
        monkeypatch.setattr(kind, "_entries", dict(kind._entries))
        monkeypatch.setattr(kind, "_aliases", dict(kind._aliases))
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def code_of(notebook: Path) -> list[str]:
    """The cells that a kernel would run."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_tutorials_run(
    notebook: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for kind in effformer.registry.KINDS.values():
        assert list(kind)
        monkeypatch.setattr(kind, "_entries", dict(kind._entries))
        monkeypatch.setattr(kind, "_aliases", dict(kind._aliases))
    known: dict[str, Any] = {"__name__": "__main__"}
    for i, code in enumerate(code_of(notebook)):
        exec(compile(code, f"{notebook.name}, cell {i}", "exec"), known)
    reached = TAUGHT.get(notebook.stem)
    if reached is not None:
        assert eval(reached, known), reached
    assert capsys.readouterr().out


TAUGHT = {
    "swap": "replaced < 0.5 and learnt > 0.85 and mixed > 0.85",
    "pictures": "right > 0.8",
    "publish": "not report.failed and len(failed) == 1 and 'causal-ignores-the-future' in failed[0]",
    "edge": "report.ratio < 0.4 and samples.shape == (3, 1, 8, 8)",
    "choose": "sizes['flow'][0] == sizes['flow'][1] and sizes['softmax'][1] == 8 * sizes['softmax'][0]",
}
"""What the text of a tutorial says, and its code has found."""


def test_every_tutorial_is_a_notebook() -> None:
    pages = {page.stem for page in (ROOT / "docs" / "tutorials").glob("*.md")}
    assert {path.stem for path in NOTEBOOKS} == pages == {*TAUGHT}
    assert all(len(code_of(path)) > 2 for path in NOTEBOOKS)


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = (p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md"))
    assert not [str(page) for page in pages if f" {page}\n" not in menu]


def test_shell_blocks_name_real_verbs_and_options() -> None:
    from typer.main import get_command

    from effformer.cli.main import app

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    wrong = []
    for page in PAGES:
        for line in "\n".join(blocks(page, "(?:bash|sh|console)")).splitlines():
            for words in re.findall(r"effformer ([a-z]+)([^&|#]*)", line):
                verb, rest = words
                if verb not in verbs:
                    wrong.append(f"{page.name}: effformer {verb}")
                    continue
                options = {o for p in verbs[verb].params for o in (*p.opts, *p.secondary_opts)}
                given = re.findall(r"(?<=\s)(--?[a-z][a-z-]*)", rest)
                wrong += [f"{page.name}: effformer {verb} {o}" for o in given if o not in options]
    assert not wrong


def test_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'pip install -e ".[all]" && effformer demo' in readme
    second = 'pip install -e ".[dev]" && pytest'
    assert second in readme
    assert second in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_readme_counts_and_lists_what_there_is() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sets = [
        p for p in (ROOT / "tests" / "conformance" / "adapters").glob("*.py") if p.stem[0] != "_"
    ]
    assert f"reproduced in {len(sets)} forms**" in text
    listed = dict(
        re.findall(r"^\| `([a-z0-9-]+)` \|.*\| (n[^|]*|of that) \|$", text, flags=re.MULTILINE)
    )
    costs = {n: effformer.registry.attention.get(n).caps.cost for n in effformer.list_attention()}
    del costs["multihead"]  # the heads around a core, which stands for itself
    assert listed == costs | {"axes": "of that"}


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        ours = target.startswith(FILES)
        if ours or not target.startswith(("http://", "https://", "#", "mailto:")):
            start, place = (ROOT, target.removeprefix(FILES)) if ours else (page.parent, target)
            if not (start / place.split("#")[0]).exists():
                missing.append(target)
    assert not missing


def test_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(VERSION)}\]", text, flags=re.MULTILINE)


@pytest.mark.parametrize("tool", ["docpages.py", "doclists.py", "notebooks.py", "zoo_page.py"])
def test_generated_pages_are_current(tool: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / tool), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_are_tidy() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [sys.executable, str(ROOT / "tools" / "files.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs the docs extra: pip install 'effformer[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
