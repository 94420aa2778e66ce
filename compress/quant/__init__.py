"""Blockwise weight quantization: formats, packed layers, backends."""

from __future__ import annotations

from .activations import DynamicLinear, RowwiseInt8, dynamic_quantize_linear, quantize_rowwise
from .backends import select_backend
from .linear import PackedWeight, QuantEmbedding, QuantLinear
from .schemes import MatMulNBits, Scheme, make_scheme

__all__ = [
    "DynamicLinear",
    "MatMulNBits",
    "PackedWeight",
    "QuantEmbedding",
    "QuantLinear",
    "RowwiseInt8",
    "Scheme",
    "dynamic_quantize_linear",
    "make_scheme",
    "quantize_rowwise",
    "select_backend",
]
