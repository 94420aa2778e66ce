"""Models side by side, module by module."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from effformer.compress import quantize
from torch import nn

from effformer import build_model
from effformer.profile import breakdown, profile


def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("vit-nano", depth=3).eval()


def test_work_bytes_time_and_error_of_every_module() -> None:
    dense = model()
    x = dense.example_inputs(2)
    packed, report = quantize(dense, "int4", inputs=x)
    found = breakdown([dense, packed], x, names=["dense", "int4"], runs=2)
    counted = profile(dense, x, memory=False).by_module
    for path, (before, after) in found.boxes.items():
        assert before is not None
        assert after is not None
        assert before.macs == after.macs == counted.get(path, 0)
        assert before.error is None
    whole, small = found.boxes[""]
    assert whole.bytes == sum(p.numel() * 4 for p in (*dense.parameters(), *dense.buffers()))
    assert small.bytes < 0.25 * whole.bytes
    assert small.error == pytest.approx(report.output_error, rel=1e-4)
    block, part = found.boxes["blocks.1"], found.boxes["blocks.1.ffn.part.fc1"]
    assert block[0].bytes > part[0].bytes > part[1].bytes > 0
    assert part[1].kind != part[0].kind == "Linear"
    assert min(b.seconds for b in (whole, block[0], part[0], found.boxes["blocks"][1])) > 0
    assert found.boxes["patch_embed"][1].error == 0


def test_what_one_has_alone_and_what_cannot_be_compared() -> None:
    x = torch.linspace(-1, 1, 16).reshape(2, 8)
    wide = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    narrow = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 2), nn.Softmax(-1))
    found = breakdown([wide, narrow], x, runs=1)
    assert [*found.boxes] == ["", "0", "1", "2", "3"]
    assert found.names == ("Sequential #1", "Sequential #2")
    assert found.boxes["3"][0] is None
    assert found.boxes["0"][1].error is None  # of other shape
    assert found.boxes["2"][1].error > 0
    assert found.cells("2")["work"] == "32 → 16"
    with pytest.raises(ValueError, match="unknown module '5'"):
        found.cells("5")
    with pytest.raises(ValueError, match="breakdown: 2 models need as many different names"):
        breakdown([wide, narrow], x, names=["one"])
    with pytest.raises(ValueError, match="breakdown: no models given"):
        breakdown([], x)


def test_the_page_is_a_tree_and_loads_nothing(tmp_path: Path) -> None:
    x = torch.ones(1, 8)
    both = [nn.Sequential(nn.ModuleDict({"a<b": nn.Linear(8, n)})["a<b"]) for n in (8, 4)]
    found = breakdown(both, x, names=["<before>", "after"], runs=1)
    for suffix in ("html", "json", "txt"):
        found.save(tmp_path / f"report.{suffix}")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for outside in ("<script", "src=", "href", "@import", "url(", "<before>"):
        assert outside not in page
    assert page.count("<details") == 1
    assert re.search(r'<summary><span class="box"><b>model <i>Sequential</i></b>', page)
    assert '<span title="work">64 → 32</span>' in page
    data = json.loads((tmp_path / "report.json").read_text())
    assert [row["module"] for row in data["boxes"]] == ["", "0"]
    assert data["boxes"][1]["after"]["bytes"] == (8 * 4 + 4) * 4
    assert "64 → 32" in (tmp_path / "report.txt").read_text(encoding="utf-8")
