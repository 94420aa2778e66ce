from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effformer.flow import (
    Fixed,
    KStep,
    LogitNormal,
    Stratified,
    TimeGrid,
    TimeLaw,
    Uniform,
    UShaped,
)
from effformer.flow.times import TIME_LAWS, get_time_law

ALL = [
    Uniform(),
    Uniform(low=1e-3),
    LogitNormal(),
    UShaped(),
    UShaped(a=0.0),
    Fixed(),
    KStep(),
    Stratified(),
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
