from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_close, largest


def test_the_tolerance_follows_the_largest_value() -> None:
    expected = torch.tensor([30.0, 1e-3, 0.0])
    assert_close(expected + torch.tensor([0.0, 2e-4, -2e-4]), expected, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError, match="Greatest absolute difference: 0"):
        assert_close(expected + torch.tensor([0.0, 4e-4, 0.0]), expected, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(expected / 30 + 2e-4, expected / 30, rtol=0, atol=1e-5)


def test_a_scale_for_values_that_cancel() -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_close(torch.tensor([1e-6]), torch.zeros(1), rtol=1e-4, atol=1e-5)
    assert_close(torch.tensor([1e-6]), torch.zeros(1), rtol=1e-4, atol=1e-5, scale=1.0)


def test_each_tensor_of_a_collection_has_its_own_size() -> None:
    large, small = torch.tensor([100.0]), torch.tensor([1.0])
    with pytest.raises(AssertionError, match=r"grad: \[1\]: "):
        assert_close({"grad": [large, small + 1e-3]}, {"grad": [large, small]}, rtol=0, atol=1e-4)
    with pytest.raises(AssertionError):
        assert_close([large], [large, small], rtol=0, atol=1)
    with pytest.raises(AssertionError):
        assert_close({"a": large}, {"b": large}, rtol=0, atol=1)


def test_values_that_are_not_finite_have_no_size() -> None:
    x = torch.tensor([math.inf, math.nan, -3.0])
    assert largest(x) == 3.0
    assert largest(x[:2]) == largest(x[:0]) == largest(torch.ones(2) > 0) == 0.0
    assert_close(torch.tensor([math.inf, 3.001]), torch.tensor([math.inf, 3.0]), rtol=0, atol=1e-2)


def test_dtype_and_shape_count() -> None:
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(torch.ones(2).double(), torch.ones(2), rtol=1, atol=1)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(2, 1), torch.ones(2), rtol=1, atol=1)
