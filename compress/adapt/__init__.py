"""Low-rank adapters: small trainable changes of a frozen model."""

from __future__ import annotations

from .adapt import AdaptReport, LoRA, adapt, adapter_scale, merge, unadapt
from .files import fuse_adapters, load_adapter, save_adapter, split_adapter

__all__ = [
    "AdaptReport", "LoRA", "adapt", "adapter_scale", "fuse_adapters", "load_adapter", "merge", "save_adapter",
    "split_adapter", "unadapt",
]  # fmt: skip
