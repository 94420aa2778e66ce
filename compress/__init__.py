"""Compression: one verb per family, f(model, scheme, where) -> (model, report)."""

from __future__ import annotations

if not __name__.startswith("effformer."):
    raise ImportError(
        "import effformer.compress, not compress: a second copy of every class would be loaded"
    )

from .adapt import LoRA, adapt, adapter_scale, load_adapter, merge, save_adapter, unadapt
from .distill import Distillation
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
from .linearize import LinearizedLayer, LinearizeReport, LinearizeScheme, linearize
from .plan import Plan, plan
from .prune import Masks, PruneReport, PruneScheme, SparseScheme, cut, importance, prune, sparsify
from .quant import MatMulNBits, QuantEmbedding, QuantLinear, recording
from .quant.quantize import SENSITIVE, dequantize, quantize, quantize_
from .report import KeptLayer, PackedLayer, Report
from .transforms import replay, restore

__all__ = [
    "SENSITIVE",
    "AdaptiveReport",
    "AdaptiveScheme",
    "Budgeted",
    "Distillation",
    "Frugal",
    "GatePretraining",
    "GateTable",
    "KeptLayer",
    "LearnerDistillation",
    "LinearizeReport",
    "LinearizeScheme",
    "LinearizedLayer",
    "LoRA",
    "Masks",
    "MatMulNBits",
    "PackedLayer",
    "Plan",
    "PruneReport",
    "PruneScheme",
    "QuantEmbedding",
    "QuantLinear",
    "Report",
    "SparseScheme",
    "WorkTarget",
    "acmize",
    "adapt",
    "adapter_scale",
    "cut",
    "dequantize",
    "gate_tables",
    "importance",
    "linearize",
    "load_adapter",
    "merge",
    "optimize",
    "plan",
    "prepare_widths",
    "prune",
    "quantize",
    "quantize_",
    "recording",
    "replay",
    "restore",
    "save_adapter",
    "sort_by_magnitude",
    "sparsify",
    "unadapt",
]
