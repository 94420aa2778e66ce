"""What the demo tells of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from effformer.cli.demo_report import cost_rows, verdicts
from effformer.cli.demo_steps import RUNTIME, TORCH, Demo, Form
from effformer.train.recipes import DIGITS

from .running import invoke


def test_fastest_and_smallest_are_named_by_number_of_threads() -> None:
    forms = [
        Form(name="softmax", runtime=TORCH, bytes=20000, macs=10, milliseconds={1: 4.0, 2: 3.0}),
        Form(name="flow", runtime=TORCH, bytes=21000, macs=10, milliseconds={1: 5.0, 2: 2.0}),
        Form(name="flow int8", runtime=RUNTIME, bytes=5000, macs=10, milliseconds={1: 3.0, 2: 2.5}),
    ]
    nobody = cast("Any", None)
    demo = Demo(
        out=Path(), recipe=DIGITS, seed=0, say=print, judge=nobody, data=nobody, forms=forms, mixing=0.02
    )  # fmt: skip
    one, all_, small, why = verdicts(demo)
    assert one == "fastest with 1 thread: flow int8, onnxruntime (3.00 ms)"
    assert all_ == "fastest with 2 threads: flow (2.00 ms)"
    assert small == "smallest: flow int8, onnxruntime (5 kB)"
    assert why.startswith("with 16 tokens they meet in 2.0% of the multiply-adds")
    header, rows = cost_rows(demo)
    assert all(len(row) == len(header) for row in rows)


@pytest.mark.slow
def test_the_demo_measures_where_attention_pays(tmp_path: Path) -> None:
    invoke("demo", "--quick", "-o", str(tmp_path / "demo"))
    facts = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert facts["passed"]
    assert [one["value"] for one in facts["longer"]["found"]] == [1024, 4096]
    assert facts["verdict"][-1].endswith(f"tokens: {facts['longer']['verdicts'][0]}")
    assert 0 < facts["mixing"] < 0.1
    assert "4,096 tokens, 1 thread" in (tmp_path / "demo" / "report.html").read_text()
