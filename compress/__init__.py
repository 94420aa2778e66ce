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
    DynamicReport,
    DynamicScheme,
    Frugal,
    GatePretraining,
    GateTable,
    LearnerDistillation,
    WorkTarget,
    acmize,
    dynamize,
    gate_tables,
    prepare_widths,
    sort_by_magnitude,
)
from .explore import Exploration, Tried, explore
from .kernels import KernelReport, LayerKernel, choose_kernels, optimize
from .linearize import LinearizedLayer, LinearizeReport, LinearizeScheme, linearize
from .plan import Plan, plan
from .prune import (
    ApproximateReport,
    ApproximateScheme,
    Masks,
    PruneReport,
    PruneScheme,
    SparseScheme,
    approximate,
    cut,
    importance,
    prune,
    sparsify,
)
from .quant import MatMulNBits, QuantEmbedding, QuantLinear, recording
from .quant.control import ControlReport
from .quant.load import load_quantized
from .quant.mixed import MixedScheme
from .quant.quantize import SENSITIVE, dequantize, quantize, quantize_
from .quant.within import quantize_within
from .recipe import Recipe, RecipeReport, run_recipe
from .report import KeptLayer, PackedLayer, Report
from .sensitivity import Expected, Sensitivity, SensitivityRow, sensitivity
from .transforms import replay, restore
from .upcycle import ExpertScheme, UpcycleReport, upcycle

__all__ = [
    "SENSITIVE",
    "AdaptiveReport",
    "AdaptiveScheme",
    "ApproximateReport",
    "ApproximateScheme",
    "Budgeted",
    "ControlReport",
    "Distillation",
    "DynamicReport",
    "DynamicScheme",
    "Expected",
    "ExpertScheme",
    "Exploration",
    "Frugal",
    "GatePretraining",
    "GateTable",
    "KeptLayer",
    "KernelReport",
    "LayerKernel",
    "LearnerDistillation",
    "LinearizeReport",
    "LinearizeScheme",
    "LinearizedLayer",
    "LoRA",
    "Masks",
    "MatMulNBits",
    "MixedScheme",
    "PackedLayer",
    "Plan",
    "PruneReport",
    "PruneScheme",
    "QuantEmbedding",
    "QuantLinear",
    "Recipe",
    "RecipeReport",
    "Report",
    "Sensitivity",
    "SensitivityRow",
    "SparseScheme",
    "Tried",
    "UpcycleReport",
    "WorkTarget",
    "acmize",
    "adapt",
    "adapter_scale",
    "approximate",
    "choose_kernels",
    "cut",
    "dequantize",
    "dynamize",
    "explore",
    "gate_tables",
    "importance",
    "linearize",
    "load_adapter",
    "load_quantized",
    "merge",
    "optimize",
    "plan",
    "prepare_widths",
    "prune",
    "quantize",
    "quantize_",
    "quantize_within",
    "recording",
    "replay",
    "restore",
    "run_recipe",
    "save_adapter",
    "sensitivity",
    "sort_by_magnitude",
    "sparsify",
    "unadapt",
    "upcycle",
]
