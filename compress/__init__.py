"""Compression: one verb per family, f(model, scheme, where) -> (model, report)."""

from __future__ import annotations

if not __name__.startswith("effformer."):
    raise ImportError(
        "import effformer.compress, not compress: a second copy of every class would be loaded"
    )

from .adaptive import (
    AdaptiveReport,
    AdaptiveScheme,
    Budgeted,
    GatePretraining,
    LearnerDistillation,
    acmize,
)
from .api import SENSITIVE, dequantize, quantize, quantize_, replay
from .quant import MatMulNBits, QuantEmbedding, QuantLinear
from .report import KeptLayer, PackedLayer, Report

__all__ = [
    "SENSITIVE",
    "AdaptiveReport",
    "AdaptiveScheme",
    "Budgeted",
    "GatePretraining",
    "KeptLayer",
    "LearnerDistillation",
    "MatMulNBits",
    "PackedLayer",
    "QuantEmbedding",
    "QuantLinear",
    "Report",
    "acmize",
    "dequantize",
    "quantize",
    "quantize_",
    "replay",
]
