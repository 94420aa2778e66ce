"""The fastest evaluation of a finished model on this CPU, found by measuring."""

from __future__ import annotations

from .choose import KernelReport, LayerKernel, choose_kernels
from .exact import LeftLinear, PackedLinear, optimize

__all__ = [
    "KernelReport",
    "LayerKernel",
    "LeftLinear",
    "PackedLinear",
    "choose_kernels",
    "optimize",
]
