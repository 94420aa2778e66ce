"""Curves of numbers over a common axis."""

from __future__ import annotations

from pathlib import Path

import pytest

from effformer.profile.plots import Curves, Pareto

LINES = {"softmax": [(256, 1.0), (1024, 8.0), (16384, 2000.0)], "flow": [(256, 3.0), (16384, 90.0)]}


@pytest.mark.parametrize(("log", "scale"), [(True, "log"), (False, "linear")])
def test_curves_show_every_line_in_a_style_of_its_own(log: bool, scale: str) -> None:
    axes = Curves(LINES, "tokens", "ms", log=log).figure().axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == (scale, scale)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == list(LINES)
    first, second = axes.get_lines()
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_color() != second.get_color()
    assert list(first.get_ydata()) == [1.0, 8.0, 2000.0]


def test_a_single_point_is_seen() -> None:
    (line,) = Curves({"loss": [(1, 0.5)]}, "step", "loss").figure().axes[0].get_lines()
    assert line.get_marker() == "o"


def test_plots_are_files_and_what_notebooks_show(tmp_path: Path) -> None:
    for plot in (Curves(LINES, "tokens", "ms"), Pareto((("a", 1.0, 2.0),), "x", "y")):
        assert plot.svg().startswith("<svg")
        assert "<svg" in plot._repr_html_()
        plot.save(tmp_path / f"{type(plot).__name__}.png")
    with pytest.raises(ValueError, match=r"Curves\.save"):
        Curves(LINES, "tokens", "ms").save(tmp_path / "a.txt")
