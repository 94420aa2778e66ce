from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from effformer import build_model
from effformer.profile import Comparison, compare
from effformer.profile.plots import Pareto


@pytest.fixture(scope="module")
def comparison():
    models = [build_model("dit-nano", attn=attn) for attn in ("softmax", "flow")]
    return compare(
        [*models, "dit-nano"], names=["softmax", "flow", "by name"], warmup=0, runs=3, threads=1
    )


def test_rows(comparison) -> None:
    softmax, flow, named = comparison.rows
    assert softmax.ratio == 1.0
    assert softmax.profile.total == named.profile.total > flow.profile.total
    assert named.latency is not None
    assert named.latency.runs == 3
    text = str(comparison)
    assert "executed" not in text
    for words in ("softmax", "ratio", "3 runs each in turns", "in one process"):
        assert words in text


def test_files(comparison, tmp_path) -> None:
    comparison.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["rows"][1]["name"] == "flow"
    comparison.save(tmp_path / "c.txt")
    comparison.save(tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert page.count("<svg") == 1
    assert page.count('<details class="model">') == 3
    for outside in ("<script", "src=", "@import"):
        assert outside not in page
    comparison.pareto("latency", "macs").save(tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"suffixes: .*png"):
        comparison.pareto().save(tmp_path / "pareto.docx")


def test_names_build_on_meta_without_timing() -> None:
    stages: list[str] = []
    result = compare(["dit-xl", "dit-xl"], time=False, progress=stages.append)
    assert [row.name for row in result.rows] == ["dit-xl-2 #1", "dit-xl-2 #2"]
    assert result.rows[0].latency is None
    assert stages == ["counting dit-xl-2 #1", "counting dit-xl-2 #2"]
    with pytest.raises(ValueError, match="'latency' was not measured"):
        result.pareto("latency", "macs")
    assert result.pareto("params", "memory").front == ("dit-xl-2 #1",)
    assert "-" in str(result)


def test_refusals(comparison) -> None:
    with pytest.raises(ValueError, match="no models"):
        compare([])
    with pytest.raises(ValueError, match="did you mean 'dit-nano'"):
        compare(["dit-nanoo"])
    with pytest.raises(ValueError, match="2 models need as many different names"):
        compare([nn.Linear(2, 2)] * 2, torch.zeros(1, 2), names=["a", "a"])
    with pytest.raises(ValueError, match=r"Comparison\.pareto: x: unknown value 'speed'"):
        comparison.pareto("speed", "macs")


def test_front() -> None:
    points = (("a", 1.0, 9.0), ("b", 2.0, 5.0), ("c", 3.0, 6.0), ("d", 4.0, 1.0), ("e", 2.0, 5.5))
    assert Pareto(points, "x", "y").front == ("a", "b", "d")


SPREAD = (
    ("softmax", 144.6, 1.412), ("linear", 146.6, 1.413), ("flow", 147.5, 1.414),
    ("small", 71.4, 0.358), ("half depth", 72.5, 0.709), ("huge", 900.0, 80.0),
)  # fmt: skip
CROWDED = (
    ("softmax", 11.68, 2236.0), ("flow", 21.35, 2236.0), ("softmax int8", 20.33, 603.0),
    ("softmax nf4", 27.47, 331.0), ("flow int8", 25.57, 603.0), ("flow nf4", 34.44, 331.0),
    ("softmax, onnxruntime", 12.36, 2257.0), ("flow, onnxruntime", 9.42, 2268.0),
    ("flow int8, onnxruntime", 10.12, 816.0),
)  # fmt: skip


@pytest.mark.parametrize(("points", "scale"), [(SPREAD, "log"), (CROWDED, "linear")])
def test_labels_cover_neither_names_nor_points_nor_the_front(
    points: tuple[tuple[str, float, float], ...], scale: str
) -> None:
    plot = Pareto(points, "x", "y")
    figure = plot.figure()
    axes = figure.axes[0]
    assert axes.get_xscale() == scale
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    from matplotlib.text import Text

    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert sorted(text.get_text() for text in axes.texts) == sorted(p[0] for p in points)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    places = axes.transData.transform([(x, y) for _, x, y in points])
    assert not any(box.contains(*place) for box in boxes for place in places)
    frame = axes.get_window_extent(renderer)
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 for b in boxes)
    assert all(frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
    line = axes.transData.transform(sorted(p[1:] for p in points if p[0] in plot.front))
    steps = torch.linspace(0, 1, 50)[:, None]
    for start, end in pairwise(torch.as_tensor(line)):
        for place in start + steps * (end - start):
            assert not any(box.contains(*place.tolist()) for box in boxes)


def test_quality_is_what_times_are_drawn_against(comparison, tmp_path) -> None:
    """As soon as it is known of all rows, a file without a profile among them."""
    qualities = {"softmax": 0.99, "flow": 0.9, "by name": 0.75}
    rows = [dataclasses.replace(row, quality=qualities[row.name]) for row in comparison.rows]
    rows[2] = dataclasses.replace(rows[2], profile=None, bytes=10)
    judged = Comparison(tuple(rows))
    assert comparison.against() != "errors"
    assert judged.against() == "errors"
    errors = [y for _, _, y in judged.pareto("latency", "errors").points]
    assert errors == pytest.approx([1, 10, 25])
    assert judged.to_dict()["rows"][1]["quality"] == 0.9
    assert "75.0%" in str(judged)
    assert "recognised" not in str(comparison)
    for number, some in ((2, judged), (0, Comparison((rows[2],)))):
        some = dataclasses.replace(some, how="so")
        some.save(tmp_path / f"{number}.html")
        page = (tmp_path / f"{number}.html").read_text()
        assert page.count('<details class="model">') == number
        assert "not recognised / %" in page
