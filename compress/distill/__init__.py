"""Distillation: a student learns from what a teacher computes."""

from __future__ import annotations

from .objective import LOSSES, Distillation

__all__ = ["LOSSES", "Distillation"]
