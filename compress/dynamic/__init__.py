"""Dynamic models: their training losses, their gates over time, and the way from a dense model."""

from __future__ import annotations

from .adaptive import (
    AdaptiveReport,
    AdaptiveScheme,
    Budgeted,
    GatePretraining,
    LearnerDistillation,
    acmize,
)
from .gates import Frugal, GateTable, gate_tables, prepare_widths, sort_by_magnitude
from .work import WorkTarget

__all__ = [
    "AdaptiveReport",
    "AdaptiveScheme",
    "Budgeted",
    "Frugal",
    "GatePretraining",
    "GateTable",
    "LearnerDistillation",
    "WorkTarget",
    "acmize",
    "gate_tables",
    "prepare_widths",
    "sort_by_magnitude",
]
