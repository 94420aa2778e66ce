"""Blockwise weight quantization: formats, packed layers, backends."""

from __future__ import annotations

from . import awq, bct, gptq, hqq, rotate, smooth, svdquant, symmetric
from .activations import DynamicLinear, RowwiseInt8, dynamic_quantize_linear, quantize_rowwise
from .backends import select_backend
from .calibrate import recording
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
    "awq",
    "bct",
    "dynamic_quantize_linear",
    "gptq",
    "hqq",
    "make_scheme",
    "quantize_rowwise",
    "recording",
    "rotate",
    "select_backend",
    "smooth",
    "svdquant",
    "symmetric",
]
