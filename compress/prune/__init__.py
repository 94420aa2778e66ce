"""Pruning: smaller models without the units that matter least."""

from __future__ import annotations

from .allocate import PruneScheme
from .cut import cut
from .importance import importance
from .masks import Masks, SparseScheme, sparsify
from .prune import prune
from .report import PrunedPart, PruneReport

__all__ = [
    "Masks", "PruneReport", "PruneScheme", "PrunedPart", "SparseScheme", "cut", "importance", "prune",
    "sparsify",
]  # fmt: skip
