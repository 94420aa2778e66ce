"""Who is faster where, and from where on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effformer.profile import Comparison, ComparisonRow, Latency, Sweep, machine
from effformer.profile.sweep import crossover


@pytest.mark.parametrize("place", [1.5, 37.0, 900.0])
def test_powers_cross_where_they_are_equal(place: float) -> None:
    """x^2 and place x are equal at x = place."""
    positions = [1.0, 10.0, 100.0, 1000.0]
    found = crossover({x: x**2 for x in positions}, {x: place * x for x in positions})
    assert found == pytest.approx(place)


def test_everywhere_and_nowhere() -> None:
    first = {2: 5.0, 1: 5.0, 4: 5.0}
    assert crossover(first, {1: 4.0, 2: 4.0, 4: 4.0}) == 1
    assert crossover(first, {1: 4.0, 2: 4.0, 4: 6.0}) is None
    assert crossover(first, {1: 4.0, 2: 6.0, 4: 4.0}) == pytest.approx(2.7, abs=0.2)
    assert crossover(first, first) is None


def comparison(times: dict[str, float]) -> Comparison:
    rows = []
    for name, t in times.items():
        taken = Latency(
            name=name, median=t, p10=t, p90=t, runs=1, warmup=0, threads=1, dtype="float32",
            device="cpu", form="eager", machine=machine(), samples=(t,),
        )  # fmt: skip
        rows.append(ComparisonRow(name, None, ((taken, t / times["softmax"]),), bytes=1000))
    return Comparison(tuple(rows), "in a test")


def test_a_sweep_says_from_where_on(tmp_path: Path) -> None:
    sizes = {8: (1e-3, 2e-3, 9e-3), 16: (16e-3, 8e-3, 99e-3)}
    found = {
        n: comparison(dict(zip(("softmax", "flow", "slow"), t, strict=True)))
        for n, t in sizes.items()
    }
    sweep = Sweep("input_size", found)
    assert sweep.names == ("softmax", "flow", "slow")
    assert sweep.times("flow") == {8: 2.0, 16: 8.0}
    assert sweep.verdicts() == [
        "flow is faster than softmax from input_size=11.3 on",
        "slow is not faster than softmax at input_size=16",
    ]
    assert "input_size  softmax" in str(sweep)
    for suffix in ("json", "html", "txt"):
        sweep.save(tmp_path / f"sweep.{suffix}")
    assert json.loads((tmp_path / "sweep.json").read_text())["verdicts"] == sweep.verdicts()
    text = (tmp_path / "sweep.html").read_text()
    assert "<svg" in text
    assert "<h2>input_size=16</h2>" in text
