"""Checks for authors of parts: what the contract tests of this library run, for a part of yours.

Example:
    >>> import effformer
    >>> "samples-do-not-see-each-other" in str(effformer.testing.check_part("swiglu"))
    True
"""

from .check import check_part
from .packages import new_package
from .report import Finding, PartReport

__all__ = ["Finding", "PartReport", "check_part", "new_package"]
