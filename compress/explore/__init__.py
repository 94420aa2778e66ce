"""Recipes under a budget: which of several keeps a target of time, size or work at the least loss."""

from __future__ import annotations

from .explore import explore
from .result import Exploration, Tried

__all__ = ["Exploration", "Tried", "explore"]
