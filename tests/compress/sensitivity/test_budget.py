"""Formats under a budget: kept, near the optimum, and refused where no format meets it."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from effformer.compress import MixedScheme, Sensitivity, SensitivityRow, quantize, sensitivity
from effformer.compress.sensitivity.budget import Option, pick
from torch import nn


def best(units: list[list[Option]], limit: float) -> float:
    """The least loss, by trying everything."""
    fits = (
        sum(o.loss for o in some)
        for some in itertools.product(*units)
        if sum(o.cost for o in some) <= limit
    )
    return min(fits, default=float("inf"))


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_fits_and_is_at_most_one_step_from_the_optimum(seed: int) -> None:
    chance = random.Random(seed)
    units = [
        [Option(chance.uniform(0, 10), chance.uniform(0, 10)) for _ in range(3)]
        for _ in range(chance.randint(1, 6))
    ]
    least = sum(min(o.cost for o in own) for own in units)
    most = sum(max(o.cost for o in own) for own in units)
    assert pick(units, least - 0.01) is None
    for part in (0.0, 0.3, 0.7, 1.0):
        limit = least + part * (most - least) + 1e-9
        found = pick(units, limit)
        assert found is not None
        chosen = [own[i] for own, i in zip(units, found, strict=True)]
        assert sum(o.cost for o in chosen) <= limit
        largest = max(o.loss for own in units for o in own)
        assert best(units, limit) - 1e-9 <= sum(o.loss for o in chosen)
        assert sum(o.loss for o in chosen) <= best(units, limit) + largest
    every = pick(units, most + 1e-9)
    assert every is not None
    assert sum(own[i].loss for own, i in zip(units, every, strict=True)) == pytest.approx(
        sum(min(o.loss for o in own) for own in units)
    )


def row(name: str, scheme: str, after: int, mse: float, seconds: float) -> SensitivityRow:
    return SensitivityRow(
        name=name, layers=(name,), scheme=scheme, params=100, bytes_before=400, bytes_after=after,
        header=5, mse=mse, cosine=1.0, kl=None, seconds_before=1.0, seconds_after=seconds,
    )  # fmt: skip


def found() -> Sensitivity:
    """Two layers; the second bears 4 bits badly, and is slow in 8."""
    rows = (
        row("a", "int8", 100, 1e-6, 0.5), row("a", "int4", 50, 1e-4, 0.8),
        row("b", "int8", 100, 1e-6, 2.0), row("b", "int4", 50, 1e-2, 0.4),
    )  # fmt: skip
    schemes = {"int8": {"name": "int8"}, "int4": {"name": "int4"}}
    return Sensitivity(rows=rows, schemes=schemes, file_bytes=1000, samples=1, machine="")


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ({"bits": 8}, ("int8", "int8")),
        ({"bits": 6}, ("int4", "int8")),
        ({"bits": 4}, ("int4", "int4")),
        ({"bits": 100}, (None, None)),
        ({"bytes": 0.41}, ("int8", "int8")),
        ({"bytes": 409}, ("int4", "int8")),
        ({"error": 0.02}, ("int4", "int8")),
        ({"error": 0.2}, ("int4", "int4")),
        ({"error": 1e-9}, (None, None)),
        ({"latency": 0.75}, ("int8", None)),
        ({"latency": 0.45}, ("int8", "int4")),
    ],
    ids=str,
)
def test_every_goal_chooses_what_it_should(target: dict[str, float], chosen: Any) -> None:
    scheme = found().budget(**target)
    names = tuple(None if s is None else s["name"] for s in scheme.schemes.values())
    assert names == chosen


def test_a_target_out_of_reach_is_refused_with_the_best() -> None:
    for target, words in (
        ({"bits": 3}, "bits=4"),
        ({"bytes": 0.2}, "bytes=0.31"),
        ({"latency": 0.1}, "latency=0.45"),
    ):
        with pytest.raises(
            ValueError, match=f"cannot be met with int8, int4; the least .* {words}"
        ):
            found().budget(**target)
    with pytest.raises(ValueError, match="give one of bits, bytes, error, latency, got none"):
        found().budget()
    with pytest.raises(ValueError, match="got bits, error"):
        found().budget(bits=4, error=0.1)
    with pytest.raises(ValueError, match="no rows of classes"):
        found().budget(bits=4, by="kl")


def test_a_choice_says_what_it_is_expected_to_give() -> None:
    scheme = found().budget(bits=6)
    expected = found().expected(scheme)
    assert expected.bits == pytest.approx(6)
    assert expected.bytes == 200 + 150 + 10
    assert expected.error == pytest.approx((1e-4 + 1e-6) ** 0.5)
    assert expected.latency == pytest.approx((0.8 + 2.0) / 2)
    with pytest.raises(ValueError, match="names no format for 'a'"):
        found().expected(MixedScheme(schemes={"*": "int8"}))
    with pytest.raises(ValueError, match="was not tried"):
        found().expected(MixedScheme(schemes={"a": {"name": "nf4"}, "b": None}))


def test_a_budget_is_kept_by_the_quantized_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).eval()
    data = {"input": torch.randn(32, 64)}
    seen = sensitivity(model, ["int8", "int4"], data=data, runs=1)
    for target in ({"bytes": 0.24}, {"bytes": 20_000}, {"error": 0.05}, {"bits": 7}):
        scheme = seen.budget(**target)
        _, report = quantize(model, scheme, data=data)
        expected = seen.expected(scheme)
        assert expected.bytes == pytest.approx(report.bytes_after, abs=400)
        assert report.bytes_after <= expected.bytes
        if (size := target.get("bytes")) is not None:
            assert report.bytes_after <= (size * report.bytes_before if size < 1 else size)
        assert report.output_error is not None
        assert report.output_error <= 1.5 * expected.error


def test_layers_are_named_by_patterns_of_which_the_first_counts() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    small, report = quantize(model, {"schemes": {"2": None, "0": "int4", "*": "int8"}})
    assert {layer.name: layer.scheme for layer in report.layers} == {"0": "int4", "1": "int8"}
    assert {kept.name: kept.reason for kept in report.kept} == {"2": "the scheme names none for it"}
    assert type(small[2]) is nn.Linear
    same, report = quantize(model, MixedScheme(schemes={"*": None}))
    assert report.ratio == 1
    assert not report.layers
    assert not getattr(same, "transforms", ())
    for wrong, words in (
        ({}, "empty"), ({"nowhere": "int8"}, "matches no module"), ({"*": "int88"}, "did you mean"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            quantize(model, {"schemes": wrong})
