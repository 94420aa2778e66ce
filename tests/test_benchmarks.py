"""Benchmarks run, in a small form: what they print means nothing then, and is not kept."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
HELPERS = {"cpu_time", "markdown", "sentences"}
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)
SMALL = [name for name in SCRIPTS if "--small" in (FOLDER / f"{name}.py").read_text()]


@pytest.mark.parametrize("name", sorted(p.stem for p in (FOLDER / "results").glob("*.md")))
def test_every_result_has_a_benchmark(name: str) -> None:
    assert name in SCRIPTS
    text = (FOLDER / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert f"benchmarks/{name}.py" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_form_runs_and_keeps_nothing(name: str) -> None:
    result = FOLDER / "results" / f"{name}.md"
    before = result.read_bytes() if result.exists() else None
    if name == "peers" and find_spec("performer_pytorch") is None:
        pytest.skip("needs the bench extra: pip install 'effformer[bench]'")
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| what |" in done.stdout
    assert (result.read_bytes() if result.exists() else None) == before
