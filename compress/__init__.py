"""Compression: one verb per family, f(model, scheme, where) -> (model, report)."""

from __future__ import annotations

if not __name__.startswith("effformer."):
    raise ImportError(
        "import effformer.compress, not compress: a second copy of every class would be loaded"
    )

from .api import SENSITIVE, dequantize, quantize, quantize_, replay
from .quant import MatMulNBits, QuantEmbedding, QuantLinear
from .report import KeptLayer, PackedLayer, Report

__all__ = [
    "SENSITIVE",
    "KeptLayer",
    "MatMulNBits",
    "PackedLayer",
    "QuantEmbedding",
    "QuantLinear",
    "Report",
    "dequantize",
    "quantize",
    "quantize_",
    "replay",
]
