"""Cost: multiply-adds, latency, memory, with pictures.

`profile` counts one forward, `latency` times it, `compare` does both for several models;
`effformer.profile.formulas` holds the closed formulas.
"""

from __future__ import annotations

from .benchmark import Benchmark, Candidate, benchmark
from .breakdown import Box, Breakdown, breakdown
from .compare import Comparison, ComparisonRow, compare
from .counter import Counter
from .latency import Latency, SideBySide, interleave, latency
from .machine import Machine, machine
from .memory import Memory, MemoryTracker, peak_memory, peak_rss
from .operators import register_formula
from .profiler import count_parameters, profile
from .quality import Quality
from .result import Profile
from .save import SUFFIXES
from .sweep import Sweep

__all__ = [
    "SUFFIXES",
    "Benchmark",
    "Box",
    "Breakdown",
    "Candidate",
    "Comparison",
    "ComparisonRow",
    "Counter",
    "Latency",
    "Machine",
    "Memory",
    "MemoryTracker",
    "Profile",
    "Quality",
    "SideBySide",
    "Sweep",
    "benchmark",
    "breakdown",
    "compare",
    "count_parameters",
    "interleave",
    "latency",
    "machine",
    "peak_memory",
    "peak_rss",
    "profile",
    "register_formula",
]
