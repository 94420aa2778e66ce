"""Plots of what was measured, drawn with matplotlib and readable without colour."""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effformer.checks import need
from effformer.notebook import Shown

from .save import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Confusion", "Curves", "Pareto"]

# Okabe and Ito's palette keeps its contrasts for the common kinds of colour blindness.
_BLUE, _GREY, _INK = "#0072B2", "#8A8F98", "#30343B"
# Another line style for each curve, for those who see no colours.
_CURVES = (
    (_BLUE, "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    (_INK, (0, (5, 1))),
)

# Offsets of a name from its point in typographic points: beside, above and below, then further out.
_PLACES = [(9, 0), (-9, 0), (0, 11), (0, -11)] + [
    (dx, sign * dy) for dy in (18, 32, 46, 60) for sign in (1, -1) for dx in (-14, 14)
]


class _Plot(Shown, ABC):
    """What every plot can be written as; a notebook shows it."""

    __slots__ = ()

    @abstractmethod
    def figure(self) -> Figure:
        """Draw."""

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write as .png, .svg or .pdf, by the suffix.

        Raises:
            ValueError: a suffix that matplotlib cannot write.
            FormatError: the file cannot be written, or is no earlier figure (``force`` replaces it
                all the same); an existing one is intact.
        """
        save_figure(path, self.figure(), where=f"{type(self).__name__}.save", force=force)

    def svg(self) -> str:
        """The plot as an SVG element for a page."""
        buffer = io.StringIO()
        with need("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": "effformer"}):
            self.figure().savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :]

    def _body(self) -> str:
        return f'<div class="plot">{self.svg()}</div>'


@dataclass(frozen=True, slots=True)
class Curves(_Plot):
    """Numbers over a common axis.

    Attributes:
        lines: name -> points (x, y), in the order of x.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        log: both axes are logarithmic where their values span more than a factor of ten.
    """

    lines: Mapping[str, Sequence[tuple[float, float]]]
    x: str
    y: str
    log: bool = False

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"line": name, self.x: x, self.y: y}
            for name, points in self.lines.items()
            for x, y in points
        ]

    def figure(self) -> Figure:
        """Draw, each line in a colour and a style of its own."""
        size = (6.4, 3.8 if self.log else 2.8)
        figure: Figure = need("matplotlib.figure").Figure(size, dpi=160, layout="constrained")
        axes = figure.add_subplot()
        if self.log:
            every = [point for points in self.lines.values() for point in points]
            _scale(axes.xaxis, axes.set_xscale, [x for x, _ in every])
            _scale(axes.yaxis, axes.set_yscale, [y for _, y in every])
        for (name, points), (color, line) in zip(self.lines.items(), cycle(_CURVES), strict=False):
            xs, ys = zip(*points, strict=True)
            marker = "o" if self.log or len(points) == 1 else ""
            axes.plot(
                xs,
                ys,
                linestyle=line,
                marker=marker,
                color=color,
                linewidth=1.4,
                markersize=3,
                label=name,
            )
        axes.set_xlabel(self.x)
        axes.set_ylabel(self.y)
        axes.grid(True, color="#D9DCE1", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        return figure


@dataclass(frozen=True, slots=True)
class Pareto(_Plot):
    """Two costs per model, less is better for both; the front joins what no other model beats.

    Attributes:
        points: (name, x, y).
        x: label of the horizontal axis.
        y: label of the vertical axis.
    """

    points: tuple[tuple[str, float, float], ...]
    x: str
    y: str

    @property
    def front(self) -> tuple[str, ...]:
        """Names that no other point beats: none is at least as good in both and better in one."""
        best = math.inf
        names: list[str] = []
        for name, _, y in sorted(self.points, key=lambda p: p[1:]):
            if y < best:
                best = y
                names.append(name)
        return tuple(names)

    def _rows(self) -> list[dict[str, Any]]:
        front = self.front
        return [
            {"name": name, self.x: x, self.y: y, "front": name in front}
            for name, x, y in self.points
        ]

    def figure(self) -> Figure:
        """Draw; an axis is logarithmic where its values span more than a factor of ten."""
        figure: Figure = need("matplotlib.figure").Figure((6.4, 4.2), dpi=160, layout="constrained")
        need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _scale(axes.xaxis, axes.set_xscale, [x for _, x, _ in self.points])
        _scale(axes.yaxis, axes.set_yscale, [y for _, _, y in self.points])
        front = self.front
        on = sorted((p for p in self.points if p[0] in front), key=lambda p: p[1])
        off = [p for p in self.points if p[0] not in front]
        axes.plot([p[1] for p in on], [p[2] for p in on], "-", color=_BLUE, linewidth=1.2, zorder=1)
        axes.plot(
            [p[1] for p in on],
            [p[2] for p in on],
            "o",
            color=_BLUE,
            markersize=7,
            label="Pareto front",
        )
        if off:
            axes.plot(
                [p[1] for p in off],
                [p[2] for p in off],
                "D",
                markerfacecolor="white",
                markeredgecolor=_GREY,
                markersize=6,
                label="beaten by another",
            )
        axes.margins(0.18)
        axes.set_xlabel(self.x)
        axes.set_ylabel(self.y)
        axes.grid(True, which="major", color="#D9DCE1", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        _label(figure, axes, self.points, front=[p[1:] for p in on])
        return figure


@dataclass(frozen=True, slots=True)
class Confusion(_Plot):
    """What every class is taken for.

    Attributes:
        classes: their names.
        counts: samples by true class (rows) and chosen class (columns).
    """

    classes: Sequence[str]
    counts: Sequence[Sequence[int]]

    def figure(self) -> Figure:
        """Draw shares of the rows, with the counts as far as they can be read."""
        few, readable = len(self.classes) <= 20, len(self.classes) <= 40
        figure: Figure = need("matplotlib.figure").Figure((6.4, 5.4), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        shares = [[n / max(sum(row), 1) for n in row] for row in self.counts]
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if few:
            cells = ((i, j, n) for i, row in enumerate(self.counts) for j, n in enumerate(row) if n)
            for i, j, n in cells:
                color = "white" if shares[i][j] > 0.5 else _INK
                axes.text(j, i, f"{n}", ha="center", va="center", fontsize=7, color=color)
        names = [name if len(name) <= 16 else f"{name[:14]}..." for name in self.classes]
        places = range(len(names)) if readable else []
        axes.set_xticks(
            places, names if readable else [], rotation=90 if max(map(len, names)) > 2 else 0
        )
        axes.set_yticks(places, names if readable else [])
        axes.tick_params(length=0, labelsize=7)
        axes.set_xlabel("taken for")
        axes.set_ylabel("class")
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class")
        return figure


def _scale(axis: Any, scale: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with readable ticks if the values span more than a factor of ten; whole
    numbers have ticks at whole numbers.
    """
    ticks = need("matplotlib.ticker")
    if min(values) <= 0 or max(values) / min(values) <= 10:
        if all(float(value).is_integer() for value in values):
            axis.set_major_locator(ticks.MaxNLocator(integer=True))
        return
    scale("log")
    axis.set_major_locator(ticks.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticks.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticks.NullFormatter())


def _label(
    figure: Any,
    axes: Any,
    points: Sequence[tuple[str, float, float]],
    front: Sequence[tuple[float, float]],
) -> None:
    """Name every point where the name covers nothing; a thin line leads to names that had to step
    aside.
    """
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    bounds = need("matplotlib.transforms").Bbox.from_bounds
    centres = axes.transData.transform([(x, y) for _, x, y in points])
    taken = [bounds(x - 9, y - 9, 18, 18) for x, y in centres]
    for (x0, y0), (x1, y1) in pairwise(axes.transData.transform(front)):
        steps = [i / 100 for i in range(101)]
        taken += [bounds(x0 + s * (x1 - x0), y0 + s * (y1 - y0), 1, 1) for s in steps]
    frame = axes.get_window_extent(renderer)
    for i in sorted(range(len(points)), key=lambda i: points[i][1:]):
        name, x, y = points[i]
        best: tuple[int, Any, Any] | None = None
        for dx, dy in _PLACES:
            far = abs(dx) + abs(dy) > 16
            text = axes.annotate(
                name,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                fontsize=8,
                color=_INK,
                va="center",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.6, "shrinkB": 4}
                if far
                else None,
            )
            text.set_in_layout(False)  # names that move the axes would no longer fit
            text.update_positions(renderer)
            box = need("matplotlib.text").Text.get_window_extent(text, renderer)  # without the line
            others = (other for j, other in enumerate(taken) if j != i)
            clashes = sum(box.overlaps(other) for other in others)
            clashes += not (frame.x0 <= box.x0 and box.x1 <= frame.x1)
            clashes += not (frame.y0 <= box.y0 and box.y1 <= frame.y1)
            if best is None or clashes < best[0]:
                if best is not None:
                    best[1].remove()
                best = (clashes, text, box)
            else:
                text.remove()
            if not clashes:
                break
        if best is not None:
            taken.append(best[2])
