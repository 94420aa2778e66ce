"""Pruning: smaller models without the units that matter least."""

from __future__ import annotations

from .allocate import PruneScheme
from .approximate import ApproximateReport, ApproximateScheme, approximate
from .cut import cut
from .importance import importance
from .masks import Masks, SparseScheme, sparsify
from .prune import prune
from .report import PrunedPart, PruneReport

__all__ = [
    "ApproximateReport", "ApproximateScheme", "Masks", "PruneReport", "PruneScheme", "PrunedPart", "SparseScheme",
    "approximate", "cut", "importance", "prune", "sparsify",
]  # fmt: skip
