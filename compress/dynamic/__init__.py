"""Dynamic models: their training losses, their gates over time, and the way from a dense model."""

from __future__ import annotations

from .adaptive import AdaptiveReport, AdaptiveScheme, acmize
from .dynamize import DynamicReport, DynamicScheme, dynamize
from .gates import Frugal, GateTable, gate_tables, prepare_widths, sort_by_magnitude
from .phases import Budgeted, GatePretraining, LearnerDistillation
from .work import WorkTarget

__all__ = [
    "AdaptiveReport",
    "AdaptiveScheme",
    "Budgeted",
    "DynamicReport",
    "DynamicScheme",
    "Frugal",
    "GatePretraining",
    "GateTable",
    "LearnerDistillation",
    "WorkTarget",
    "acmize",
    "dynamize",
    "gate_tables",
    "prepare_widths",
    "sort_by_magnitude",
]
