"""What notebooks show of results, data and models."""

from __future__ import annotations

import base64
import importlib
import inspect
import io
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from effformer.compress import adapt, prune, quantize
from PIL import Image
from torch import nn

import effformer
from effformer import profile
from effformer.checks import MissingExtra
from effformer.flow import SampleResult
from effformer.notebook import Shown, model_tree, picture_grid
from effformer.profile.plots import Curves, Pareto
from effformer.testing.report import Finding, PartReport
from effformer.train import Dataset


class Tags(HTMLParser):
    """Every tag that opens also closes, in order."""

    VOID = ("meta", "img", "br", "path", "use")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 3))


X = torch.linspace(-1, 1, 128).reshape(2, 64)


def compared() -> profile.Comparison:
    return profile.compare([network(), network()], X, names=["a<b", "c"], runs=1, warmup=0)


def shown() -> dict[str, Any]:
    one = compared()
    model = effformer.build_model("sit-nano", input_size=8, channels=1)
    return {
        "profile": profile.profile(network(), X),
        "comparison": one,
        "breakdown": profile.breakdown([network(), network()], X, names=["a<b", "c"], runs=1),
        "sweep": profile.Sweep("size", {1.0: one, 2.0: one}),
        "latency": profile.latency(network(), X, runs=1, warmup=0),
        "side by side": profile.interleave({"a": network()}, X, runs=1, warmup=0),
        "quantized": quantize(network(), "int8")[1],
        "pruned": prune(model, {"keep": 0.5})[1],
        "adapted": adapt(network(), {"rank": 2}, "*")[1],
        "curves": Curves({"a": [(1.0, 2.0), (2.0, 3.0)]}, "x", "y"),
        "pareto": Pareto((("a", 1.0, 2.0), ("b", 2.0, 3.0)), "ms", "GMACs"),
        "part": PartReport("flow", (Finding("attention flow", "a-check", "holds"),)),
        "data": Dataset("squares", {"x": torch.rand(5, 3, 4, 4), "y": torch.arange(5) % 2}, ("a", "b")),
        "samples": SampleResult(torch.rand(3, 1, 4, 4), None, (0.0, 1.0), 1),
        "latents": SampleResult(torch.rand(3, 16, 4, 4), None, (0.0, 1.0), 1),
    }  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return shown()


def test_everything_is_shown_in_whole_tags(results: dict[str, Any]) -> None:
    for name, one in results.items():
        text = one._repr_html_()
        Tags(text)
        assert text.startswith('<div class="effformer"><style>.effformer {'), name
        assert "<script" not in text
    assert "a&lt;b" in results["comparison"]._repr_html_()
    assert "<svg" in results["pareto"]._repr_html_()
    assert "<img" in results["samples"]._repr_html_()
    assert "<img" not in results["latents"]._repr_html_()
    assert "(3, 16, 4, 4)" in results["latents"]._repr_html_()
    assert "<td>0</td>" in results["quantized"]._repr_html_()


def test_every_report_is_shown() -> None:
    """What ends with "Report", or has a text and a dict of its own."""
    found = set()
    for name in ("cache", "compress", "export", "profile", "testing", "train", "loading"):
        for thing in vars(importlib.import_module(f"effformer.{name}")).values():
            if inspect.isclass(thing) and thing.__module__.startswith("effformer."):
                own = vars(thing)
                if thing.__name__.endswith("Report") or {"to_dict", "__str__"} <= {*own}:
                    found.add(thing)
    assert len(found) > 8
    assert [thing.__name__ for thing in found if not issubclass(thing, Shown)] == []


def test_rows_become_a_frame(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    modules = results["profile"].to_frame()
    assert modules[0]["macs"] == results["profile"].total == 64 * 8 * 2 + 8 * 3 * 2
    assert [row["name"] for row in results["comparison"].to_frame()] == ["a<b", "c"]
    assert results["comparison"].to_frame()[0]["latency_ms"] > 0
    assert [row["size"] for row in results["sweep"].to_frame()] == [1.0, 1.0, 2.0, 2.0]
    assert results["pareto"].to_frame()[1] == {"name": "b", "ms": 2.0, "GMACs": 3.0, "front": False}
    assert [row["name"] for row in results["quantized"].to_frame()] == ["0", "2"]
    assert results["part"].to_frame()[0]["check"] == "a-check"
    for name, one in results.items():
        rows = one.to_frame()
        assert rows, name
        assert all(isinstance(row, dict) for row in rows)


def test_without_pandas_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        MissingExtra, match=r"'pandas' cannot be .*pip install 'effformer\[notebook\]'"
    ):
        profile.profile(network(), X).to_frame()


def test_pictures_are_those_of_the_batch() -> None:
    x = torch.rand(5, 3, 4, 6) * 2 - 1
    source = re.search(r"base64,([^\"]+)", picture_grid(x, (-1.0, 1.0), "t"))
    assert source is not None
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(source[1]))))
    assert image.shape == (2 * 6, 4 * 8, 3)
    expected = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for i in range(5):
        top, left = 1 + i // 4 * 6, 1 + i % 4 * 8
        np.testing.assert_array_equal(image[top : top + 4, left : left + 6], expected[i])
    grey = re.search(r"base64,([^\"]+)", picture_grid(x[:, :1], (-1.0, 1.0), "t"))
    assert grey is not None
    assert Image.open(io.BytesIO(base64.b64decode(grey[1]))).mode == "L"


def test_models_are_trees() -> None:
    model = effformer.build_model("vit-nano", depth=3)
    text = model._repr_html_()
    Tags(text)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    assert f"0-2: PreNorm (3 x {block:,})<em>{3 * block:,}</em>" in text
    mixed = effformer.build_model("vit-nano", depth=2, layers={"0": {"ffn": "swiglu"}})
    assert "0: PreNorm" in model_tree(mixed, "m")
    assert "1: PreNorm" in model_tree(mixed, "m")


def test_long_tables_are_cut() -> None:
    findings = tuple(Finding("s", f"check-{i}", "holds") for i in range(300))
    text = PartReport("x", findings)._repr_html_()
    assert "check-199" in text
    assert "check-200" not in text
    assert "and 100 more" in text
