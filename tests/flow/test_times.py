from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effformer.flow import (
    CosMap,
    Fixed,
    KStep,
    LogitNormal,
    Mode,
    Shifted,
    Stratified,
    TimeGrid,
    TimeLaw,
    Uniform,
    UShaped,
)
from effformer.flow.times import TIME_LAWS, get_time_law, shift_of_length

ALL = [
    Uniform(),
    Uniform(low=1e-3),
    LogitNormal(),
    UShaped(),
    UShaped(a=0.0),
    Fixed(),
    KStep(),
    Stratified(),
    Mode(),
    Mode(scale=-1.0),
    CosMap(),
    Shifted(),
    Shifted(law=Mode(), shift=0.5),
]


@pytest.mark.parametrize("law", ALL, ids=repr)
def test_samples_lie_in_the_interval_and_follow_the_generator(law: TimeLaw) -> None:
    draws = [law.sample(1000, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draws[0].dtype == torch.float32
    assert draws[0].shape == (1000,)
    assert ((draws[0] >= 0) & (draws[0] <= 1)).all()
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert law.name == "fixed" or not torch.equal(draws[0], draws[2])


def test_uniform_keeps_its_distance() -> None:
    assert Uniform(low=0.4, high=0.5).sample(1000).aminmax().min >= 0.4
    assert Uniform(low=0.4, high=0.5).sample(1000).max() <= 0.5


def test_stratified_times_fill_every_part_equally() -> None:
    times = Stratified(strata=4, low=0.2).sample(400)
    parts = ((times - 0.2) / 0.8 * 4).floor().long()
    assert parts.bincount(minlength=4).tolist() == [100] * 4
    torch.testing.assert_close(parts, torch.arange(400) % 4)
    with pytest.raises(ValueError, match="strata must be at least 1, got 0"):
        Stratified(strata=0)


def test_logit_normal_moments() -> None:
    t = LogitNormal(mean=0.5, std=2.0).sample(200_000, generator=torch.Generator().manual_seed(0))
    logits = torch.logit(t.double())
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(logits.std()) == pytest.approx(2.0, abs=0.02)


@pytest.mark.parametrize("a", [0.0, 2.0, 4.0])
def test_u_shaped_density_integrates_to_one_and_is_what_is_drawn(a: float) -> None:
    law = UShaped(a=a)
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    density = law.density(u)
    assert float(torch.trapezoid(density, u)) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(density, density.flip(0))
    draws = law.sample(200_000, generator=torch.Generator().manual_seed(0))
    counts = torch.histc(draws, bins=10, min=0, max=1) / 200_000
    expected = torch.stack(
        [torch.trapezoid(density[i : i + 2001], u[i : i + 2001]) for i in range(0, 20_000, 2000)]
    )
    torch.testing.assert_close(counts.double(), expected, atol=4e-3, rtol=0)


def test_u_shaped_published_values() -> None:
    ends_and_middle = UShaped(a=4.0).density(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(ends_and_middle, torch.tensor([2.07, 0.55, 2.07]), atol=0.01, rtol=0)


def test_k_step_times() -> None:
    times = KStep(k=4, eps=1e-3).sample(1000).unique()
    expected = torch.tensor([j * (1 - 1e-3) / 4 + 1e-3 for j in range(4)])
    torch.testing.assert_close(times, expected)


def test_names_and_json() -> None:
    for law in ALL:
        assert TimeLaw.from_dict(law.to_dict()) == law
    for name, cls in TIME_LAWS.items():
        assert type(get_time_law(name)) is cls
    with pytest.raises(ValueError, match="did you mean 'uniform'"):
        get_time_law("unifrom")
    with pytest.raises(TypeError, match="expected TimeLaw or a dict of its options or str, got"):
        get_time_law(0.5)  # type: ignore[arg-type]


@given(st.integers(1, 200), st.floats(-1, 1), st.floats(-1, 1))
def test_uniform_grid_adds_up(steps: int, start: float, end: float) -> None:
    grid = TimeGrid.uniform(steps, start, end)
    assert len(grid) == steps == len(list(grid))
    assert (grid.start, grid.end) == (start, end)
    assert sum(dt for _, dt in grid) == pytest.approx(end - start, abs=1e-9)
    assert grid.reversed().reversed() == grid


def test_rectified_flow_grid_keeps_the_quirk() -> None:
    grid = TimeGrid.rectified_flow(4, eps=1e-3)
    assert [t for t, _ in grid] == pytest.approx([1e-3 + i / 4 * 0.999 for i in range(4)])
    assert [dt for _, dt in grid] == [0.25] * 4
    assert grid.end == 1.0
    assert [dt for _, dt in grid.reversed()] == [-0.25] * 4


@pytest.mark.parametrize("make", [TimeGrid.uniform, TimeGrid.rectified_flow])
def test_bad_grids(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"must lie in \[1, 1000000\]"):
        make(0)
    with pytest.raises(TypeError, match="expected int"):
        make(2.5)
    with pytest.raises(ValueError, match="at least 1 step"):
        TimeGrid((0.0,))
    with pytest.raises(ValueError, match="need 1 widths"):
        TimeGrid((0.0, 1.0), (0.5, 0.5))


@pytest.mark.parametrize(
    ("law", "uniform"),
    [
        (LogitNormal(mean=0.5, std=0.6), False),
        (Mode(scale=1.29), True),
        (Mode(scale=2 / (math.pi - 2)), True),
        (Mode(scale=-1.0), True),
        (CosMap(), False),
    ],
    ids=repr,
)
def test_densities_are_those_of_the_samples(law: Any, uniform: bool) -> None:
    """The share of samples in each of eight intervals is the integral of the density there."""
    edges = torch.linspace(0, 1, 9, dtype=torch.float64)
    cells = torch.linspace(0, 1, 80_001, dtype=torch.float64)
    if uniform:  # the density is told at u, whose times are the ends of the cells
        mids, ends = (cells[1:] + cells[:-1]) / 2, law.time(cells)
        assert (ends.diff() >= -1e-12).all()
        places, widths = law.time(mids), ends.diff()
    else:
        mids = places = (cells[1:] + cells[:-1]) / 2
        widths = cells.diff()
    mass = law.density(mids) * widths
    found = torch.stack([mass[(places >= a) & (places < b)].sum() for a, b in pairwise(edges)])
    assert float(found.sum()) == pytest.approx(1, abs=1e-3)
    n = 200_000
    drawn = law.sample(n, generator=torch.Generator().manual_seed(0)).double()
    seen = torch.histc(drawn, 8, 0, 1) / n
    torch.testing.assert_close(seen, found, rtol=0, atol=0.005)


def test_shifts_multiply_and_keep_the_ends() -> None:
    grid = TimeGrid.uniform(7)
    twice = torch.tensor(grid.shifted(2.0).shifted(1.5).points, dtype=torch.float64)
    once = torch.tensor(grid.shifted(3.0).points, dtype=torch.float64)
    torch.testing.assert_close(twice, once)
    assert (once[0], once[-1]) == (0, 1)
    assert (once.diff() > 0).all()
    sigma = 1 - torch.tensor(grid.points, dtype=torch.float64)
    torch.testing.assert_close(1 - once, 3 * sigma / (1 + 2 * sigma))
    t = Shifted(law="uniform", shift=3.0).sample(5, generator=torch.Generator().manual_seed(0))
    plain = Uniform().sample(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(1 - t, 3 * (1 - plain) / (1 + 2 * (1 - plain)))
    with pytest.raises(ValueError, match="factor must be positive, got 0"):
        grid.shifted(0)
    with pytest.raises(ValueError, match="widths of its own"):
        TimeGrid.rectified_flow(3).shifted(3.0)
    with pytest.raises(ValueError, match="unknown time law 'mod'"):
        Shifted(law="mod")


@pytest.mark.parametrize("steps", [1, 2, 28])
def test_the_grid_of_sd3_ends_with_a_step_to_the_data(steps: int) -> None:
    grid = TimeGrid.sd3(steps, 3.0)
    points = torch.tensor(grid.points, dtype=torch.float64)
    assert len(grid) == steps
    assert (points[0], points[-1]) == (0, 1)
    assert (points.diff() > 0).all()
    if steps > 1:
        least = 3 * 0.001 / (1 + 2 * 0.001)
        assert 1 - points[-2] == pytest.approx(3 * least / (1 + 2 * least))


def test_longer_images_are_shifted_further() -> None:
    assert [math.log(shift_of_length(n)) for n in (256, 4096)] == pytest.approx([0.5, 1.15])
    assert shift_of_length(1024) < shift_of_length(2048)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        shift_of_length(0)
