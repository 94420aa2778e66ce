"""What a classifier takes samples for, as text, JSON, page and picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effformer.profile import Quality

COUNTS = ((8, 2, 0), (0, 0, 0), (1, 3, 6))


def quality(**options: float) -> Quality:
    return Quality(
        model="net",
        data="shapes",
        classes=("circle", "cross", "<b>"),
        counts=COUNTS,
        how="so",
        **options,
    )


def test_shares() -> None:
    found = quality()
    assert (found.samples, found.recognised) == (20, 14 / 20)
    assert [row[:3] for row in found.table()[1]] == [
        ("circle", "10", "80.0%"),
        ("<b>", "10", "60.0%"),
    ]
    assert found.table()[1][1][3] == "cross (3), circle (1)"
    assert "70.0% of 20 samples of shapes right" in str(found)


def test_generators_tell_their_distance(tmp_path: Path) -> None:
    found = quality(judge=0.9, distance=3.25, floor=1.5)
    assert "recognised as shapes, Frechet distance 3.25 (as many real ones: 1.5)" in str(found)
    found.save(tmp_path / "q.json")
    facts = json.loads((tmp_path / "q.json").read_text())
    assert facts["recognised"] == 0.7
    assert facts["confusion"] == [list(row) for row in COUNTS]
    found.save(tmp_path / "q.html")
    page = (tmp_path / "q.html").read_text()
    assert "<svg" in page
    assert "&lt;b&gt;" in page
    assert "<b>circle" not in page


def test_of_many_classes_the_worst_are_shown() -> None:
    n = 30
    counts = tuple(tuple((i + 1) * (i == j) + (j == 0) for j in range(n)) for i in range(n))
    found = Quality(model="a", data="b", classes=tuple(map(str, range(n))), counts=counts)
    assert [row[0] for row in found.table()[1]][:3] == ["1", "2", "3"]
    assert len(found.table()[1]) == 20
    assert len(found.confusion().svg()) > 1000


def test_counts_must_be_a_table() -> None:
    with pytest.raises(ValueError, match="3 rows and columns"):
        Quality(model="a", data="b", classes=("a", "b", "c"), counts=((1, 2), (3, 4)))
