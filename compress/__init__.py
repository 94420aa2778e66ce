"""Compression: one verb per family, f(model, scheme, where) -> (model, report)."""

from __future__ import annotations

if not __name__.startswith("effformer."):
    raise ImportError(
        "import effformer.compress, not compress: a second copy of every class would be loaded"
    )

from .dynamic import (
    AdaptiveReport,
    AdaptiveScheme,
    Budgeted,
    Frugal,
    GatePretraining,
    GateTable,
    LearnerDistillation,
    WorkTarget,
    acmize,
    gate_tables,
    prepare_widths,
    sort_by_magnitude,
)
from .kernels import optimize
from .quant import MatMulNBits, QuantEmbedding, QuantLinear, recording
from .quant.quantize import SENSITIVE, dequantize, quantize, quantize_
from .report import KeptLayer, PackedLayer, Report
from .transforms import replay, restore

__all__ = [
    "SENSITIVE",
    "AdaptiveReport",
    "AdaptiveScheme",
    "Budgeted",
    "Frugal",
    "GatePretraining",
    "GateTable",
    "KeptLayer",
    "LearnerDistillation",
    "MatMulNBits",
    "PackedLayer",
    "QuantEmbedding",
    "QuantLinear",
    "Report",
    "WorkTarget",
    "acmize",
    "dequantize",
    "gate_tables",
    "optimize",
    "prepare_widths",
    "quantize",
    "quantize_",
    "recording",
    "replay",
    "restore",
    "sort_by_magnitude",
]
