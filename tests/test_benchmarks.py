"""Benchmarks run, in a small form: what they print means nothing then, and is not kept."""

from __future__ import annotations

import csv
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


def test_lines_of_the_zoo_agree_with_each_other() -> None:
    """A hybrid is the mean of its layers, and what a form learns does not hang on the length."""
    with (FOLDER / "results" / "zoo.csv").open(encoding="utf-8") as file:
        lines = {
            (r["attn"], r["layers"], r["causal"], r["tokens"]): r for r in csv.DictReader(file)
        }
    quality: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for (attn, layers, causal, tokens), line in lines.items():
        told = tuple(
            line[name] for name in ("vit_accuracy", "dit_distance", "recall", "onnx_nodes")
        )
        quality.setdefault((attn, layers, causal), set()).add(told)
        if layers:
            both = [lines[name, "", causal, tokens] for name in (attn, "softmax")]
            mean = sum(float(one["milliseconds"]) for one in both) / 2
            assert float(line["milliseconds"]) == pytest.approx(mean, rel=1e-6)
    assert {layers for _, layers, _, _ in lines} == {"", "1:1"}
    assert all(len(found) == 1 for found in quality.values())
    assert all(all(*quality[name, "", "False"]) for name in ("softmax", "flow", "gated-delta"))


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
