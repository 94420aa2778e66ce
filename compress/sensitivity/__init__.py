"""How much the output of a model changes if one layer gets another format, and formats under a budget."""

from __future__ import annotations

from .measure import sensitivity
from .result import Expected, Sensitivity, SensitivityRow

__all__ = ["Expected", "Sensitivity", "SensitivityRow", "sensitivity"]
