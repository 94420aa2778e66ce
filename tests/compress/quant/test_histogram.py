from __future__ import annotations

import pytest
import torch
from effformer.compress.quant.histogram import BINS, Histogram, entropy_range, percentile_range


def counted(*parts: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


def test_counts_do_not_hang_on_order_or_cut() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(3000) * 10.0**k for k in range(-3, 4)])
    whole = counted(x)
    for parts in (x.split(17), x.flip(0).split(1000), x[torch.randperm(len(x))].split(333)):
        made = counted(*parts)
        assert torch.equal(made.counts, whole.counts)
        assert (made.reach, made.low, made.high) == (whole.reach, whole.low, whole.high)
    left, right = counted(x[:5000]), counted(x[5000:])
    left.merge(right)
    assert torch.equal(left.counts, whole.counts)
    assert left.counts.numel() == 2 * BINS
    assert int(left.counts.sum()) == len(x)


@pytest.mark.parametrize("top", [1.0, 1.5, 2.0, 1e-30, 3e38])
def test_every_value_lies_in_its_bin(top: float) -> None:
    x = torch.linspace(-top, top, 1001, dtype=torch.float64)
    histogram = counted(x)
    counts, edges = histogram.line()
    assert int(counts.sum()) == 1001
    assert float(edges[-1]) >= top
    expected = torch.histogram(x, edges)[0]
    assert float((counts - expected).abs().max()) <= 2  # values on an edge


def test_zeros_and_nothing_have_a_range() -> None:
    assert counted().range("percentile", 99.9) == (0.0, 0.0)
    zeros = counted(torch.zeros(5))
    assert zeros.range("entropy", 99.9) == (0.0, 0.0)
    zeros.add(torch.ones(3))
    assert int(zeros.counts.sum()) == 8
    assert zeros.range("minmax", 99.9) == (0.0, 1.0)


def test_percentile_is_within_a_bin_of_the_exact_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(20000)
    histogram = counted(x)
    low, high = percentile_range(*histogram.line(), 99.0)
    width = histogram.reach / BINS
    exact = x.quantile(torch.tensor([0.005, 0.995]))
    assert abs(low - float(exact[0])) <= 2 * width
    assert abs(high - float(exact[1])) <= 2 * width


def test_entropy_cuts_outliers_and_leaves_a_flat_distribution() -> None:
    torch.manual_seed(0)
    flat = counted(torch.linspace(-1, 1, 50000))
    low, high = entropy_range(*flat.line(), stride=64)
    assert high > 0.95
    assert low < -0.95
    tailed = counted(torch.cat([torch.randn(50000), torch.tensor([60.0])]))
    assert entropy_range(*tailed.line(), stride=64)[1] < 10
