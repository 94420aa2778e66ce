"""How good a model is: what its answers, or its samples, are taken for."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from effformer.notebook import html_table
from effformer.values import Checked, Fraction, Natural, NonNegative

from .html import page, tiles
from .plots import Confusion
from .save import QUALITY, Saved
from .tables import table

__all__ = ["Quality"]

MOST = 20
"""Classes in the table; of more those that are recognised least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality(Saved, Checked):
    """What a classifier takes the samples of every class for, or what a judge takes those for that a
    generator drew.

    Attributes:
        model: what was looked at.
        data: the data set.
        classes: their names.
        counts: samples by the class that they are, or were asked to be (rows), and the one that they
            were taken for (columns).
        judge: share of real samples, which it has not seen, that the judge of a generator
            recognises; None for a classifier.
        distance: Frechet distance of a generator's samples from the data, in features of the judge.
        floor: the same distance of as many real samples.
        how: how it was measured, in words.
    """

    KIND = QUALITY

    model: str
    data: str
    classes: tuple[str, ...]
    counts: tuple[tuple[Natural, ...], ...]
    judge: Fraction | None = None
    distance: NonNegative | None = None
    floor: NonNegative | None = None
    how: str = ""

    def check(self) -> None:
        sizes = {len(self.counts), *map(len, self.counts)}
        if sizes != {len(self.classes)} or not self.samples:
            raise ValueError(
                f"Quality: counts must be a table of {len(self.classes)} rows and columns, one for "
                "each class, that is not empty"
            )

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(map(sum, self.counts))

    @property
    def recognised(self) -> float:
        """Share of the samples that are taken for what they are, in [0, 1]: the accuracy of a
        classifier.
        """
        return sum(row[i] for i, row in enumerate(self.counts)) / self.samples

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and cells, one row per class that has samples; of many the worst."""
        rows = [i for i, row in enumerate(self.counts) if sum(row)]
        if len(rows) > MOST:
            rows = sorted(rows, key=lambda i: self.counts[i][i] / sum(self.counts[i]))[:MOST]
        return ("class", "samples", "recognised", "else taken for"), [self._cells(i) for i in rows]

    def _cells(self, i: int) -> tuple[str, ...]:
        row = self.counts[i]
        others = sorted((j for j, n in enumerate(row) if n and j != i), key=lambda j: -row[j])[:3]
        taken = ", ".join(f"{self.classes[j]} ({row[j]})" for j in others)
        return self.classes[i], f"{sum(row):,}", f"{row[i] / sum(row):.1%}", taken or "-"

    def headline(self) -> str:
        """The result in one sentence."""
        if self.judge is None:
            return f"{self.model}: {self.recognised:.1%} of {self.samples:,} samples of {self.data} right"
        far = "" if self.distance is None else f", Frechet distance {self.distance:.4g}"
        real = "" if self.floor is None else f" (as many real ones: {self.floor:.4g})"
        return (
            f"{self.model}: {self.recognised:.1%} of {self.samples:,} samples recognised as "
            f"{self.data}{far}{real}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.model, "data": self.data, "samples": self.samples,
            "accuracy" if self.judge is None else "recognised": self.recognised,
            "frechet_distance": self.distance, "frechet_distance_of_real": self.floor,
            "judge_accuracy": self.judge, "classes": list(self.classes),
            "confusion": [list(row) for row in self.counts], "how": self.how,
        }  # fmt: skip

    def confusion(self) -> Confusion:
        """The counts as a picture."""
        return Confusion(self.classes, self.counts)

    def _page(self) -> str:
        shown = [(f"{self.recognised:.1%}", "right" if self.judge is None else "recognised")]
        if self.distance is not None:
            shown.append((f"{self.distance:.4g}", "Frechet distance"))
        if self.floor is not None:
            shown.append((f"{self.floor:.4g}", "of as many real ones"))
        if self.judge is not None:
            shown.append((f"{self.judge:.1%}", "of real ones recognised"))
        body = [
            f"<h1>Quality of {escape(self.model)}</h1>",
            tiles([*shown, (f"{self.samples:,}", "samples")]),
            f"<p>{escape(self.headline())}; {escape(self.how)}.</p>",
            f'<div class="plot">{self.confusion().svg()}</div>',
            "<h2>By class</h2>",
            html_table(*self.table()),
        ]
        return page(f"Quality of {self.model}", "\n".join(body), QUALITY)

    def __str__(self) -> str:
        return "\n".join([self.headline(), table(*self.table()), *([self.how] if self.how else [])])
