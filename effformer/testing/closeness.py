"""Compare numbers at a tolerance that follows their size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def largest(x: Tensor) -> float:
    """The largest finite absolute value, 0 if there is none."""
    if x.dtype is torch.bool or not x.numel():
        return 0.0
    sizes = x.detach().abs().double()
    return float(sizes[sizes.isfinite()].amax()) if sizes.isfinite().any() else 0.0


def assert_close(
    actual: Any, expected: Any, *, rtol: float, atol: float, scale: float = 0.0, what: str = ""
) -> None:
    """``|actual - expected| <= rtol |expected| + atol * max(largest |expected|, scale)``.

    The rounding error of an element of a product belongs to the size of the sums that made it, not
    to its own: single elements near zero of a tensor of size 30 are off by 1e-5 on one CPU and not
    on the next.

    Args:
        actual: a tensor, None, or a sequence or mapping of them; integers and booleans must be equal.
        expected: the same kind; each tensor has its own largest value.
        rtol: relative to each element.
        atol: relative to the largest element.
        scale: a size that the tolerance does not fall below, for values that cancel to zero.
        what: begins the message.
    """
    if expected is None:
        assert actual is None, what
        return
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), what
        for key in expected:
            place = f"{what}{key}: "
            assert_close(actual[key], expected[key], rtol=rtol, atol=atol, scale=scale, what=place)
        return
    if isinstance(expected, Sequence):
        assert len(actual) == len(expected), what
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_close(one, other, rtol=rtol, atol=atol, scale=scale, what=f"{what}[{i}]: ")
        return
    exact = not (expected.is_floating_point() or expected.is_complex())
    torch.testing.assert_close(
        actual,
        expected,
        rtol=0 if exact else rtol,
        atol=0 if exact else atol * max(largest(expected), scale),
        msg=lambda text: f"{what}{text}",
    )
