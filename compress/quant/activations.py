"""Run-time quantizers of activations: LLM.int8's rows with outlier columns, ONNX's
DynamicQuantizeLinear.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DynamicLinear", "RowwiseInt8", "dynamic_quantize_linear", "quantize_rowwise"]


class RowwiseInt8(NamedTuple):
    """Rows in int8, ``a ~ codes * absmax / 127``.

    Attributes:
        codes: (M, K) int8, 0 in outlier columns.
        absmax: (M,) float32, without the outliers.
        outliers: (O,) int64, columns that stay in floating point.
    """

    codes: Tensor
    absmax: Tensor
    outliers: Tensor


class DynamicLinear(NamedTuple):
    """A tensor in uint8, ``x ~ (codes - zero_point) * scale``.

    Attributes:
        codes: uint8, x's shape.
        scale: () float32.
        zero_point: () uint8.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def quantize_rowwise(a: Tensor, threshold: float = 0.0) -> RowwiseInt8:
    """Symmetric int8 per row; columns that hold any ``|a| >= threshold`` are left out.

    ``codes = round(a * 127 / absmax)``, halves to even.

    Args:
        a: (M, K), any float type.
        threshold: magnitude of an outlier (LLM.int8 uses 6); 0 keeps every column.

    Raises:
        ValueError: ``a`` is not a matrix, or the threshold is negative.

    Reference: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022, arXiv
        2208.07339.
    """
    if a.dim() != 2:
        raise ValueError(f"quantize_rowwise: expected (M, K), got {tuple(a.shape)}")
    if threshold < 0:
        raise ValueError(f"quantize_rowwise: threshold must not be negative, got {threshold}")
    outlier = a.abs() >= threshold if threshold > 0 else torch.zeros_like(a, dtype=torch.bool)
    columns = outlier.any(dim=0)
    # only the outliers themselves leave the range; the rest of their columns still counts for it
    inliers = a.masked_fill(outlier, 0)
    absmax = inliers.abs().amax(dim=1).float()
    factor = 127.0 / absmax.masked_fill(absmax == 0, 1.0)
    codes = (inliers * factor[:, None]).round().masked_fill(columns, 0).to(torch.int8)
    return RowwiseInt8(codes, absmax, columns.nonzero().flatten())


def dynamic_quantize_linear(x: Tensor) -> DynamicLinear:
    """ONNX DynamicQuantizeLinear: uint8 on the range of x, which is made to contain 0.

    ``scale = (max - min) / 255``, ``zero_point = round(-min / scale)``, ``codes = round(x / scale)
    + zero_point``, halves to even, saturated to 0..255.

    Args:
        x: any shape, float32.
    """
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, 255)
    codes = ((x / scale).round() + zero).clamp(0, 255)
    return DynamicLinear(codes.to(torch.uint8), scale, zero.to(torch.uint8))
