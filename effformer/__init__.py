"""effformer: the components zoo for efficient transformers.

Public names are loaded on first use, so that ``effformer --help`` does not import torch.

Example:
    >>> import effformer
    >>> model = effformer.build_model("dit-tiny", attn="flow")
    >>> model.config.attn.core
    Flow.Config(causal=False, kernel='sigmoid', clamp=1.0, eps=1e-06, flow_eps=0.0, chunk=128)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import VERSION as __version__

if TYPE_CHECKING:
    from . import compress as compress
    from . import export as export
    from . import flow as flow
    from . import models as models
    from . import profile as profile
    from . import testing as testing
    from . import train as train
    from .build import build_model as build_model
    from .build import list_attention as list_attention
    from .build import list_blocks as list_blocks
    from .build import list_ffn as list_ffn
    from .build import list_models as list_models
    from .checks import CapabilityError as CapabilityError
    from .checks import FormatError as FormatError
    from .checks import MissingExtra as MissingExtra
    from .compress import gate_tables as gate_tables
    from .compress import optimize as optimize
    from .compress import prepare_widths as prepare_widths
    from .compress import sort_by_magnitude as sort_by_magnitude
    from .context import Context as Context
    from .context import Ledger as Ledger
    from .context import Packing as Packing
    from .context import Rope as Rope
    from .context import Tap as Tap
    from .convert import convert_weights as convert_weights
    from .io import load_model as load_model
    from .io import load_weights as load_weights
    from .io import save_pretrained as save_pretrained
    from .io import save_weights as save_weights
    from .site import Site as Site

_NAMES = {
    "build": (
        "build_model",
        "list_attention",
        "list_blocks",
        "list_ffn",
        "list_models",
    ),
    "checks": (
        "CapabilityError",
        "FormatError",
        "MissingExtra",
    ),
    "context": (
        "Context",
        "Ledger",
        "Packing",
        "Rope",
        "Tap",
    ),
    "convert": ("convert_weights",),
    "compress": (
        "gate_tables",
        "optimize",
        "prepare_widths",
        "sort_by_magnitude",
    ),
    "io": (
        "load_model",
        "load_weights",
        "save_pretrained",
        "save_weights",
    ),
    "site": ("Site",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_PACKAGES = ("compress", "export", "flow", "models", "profile", "testing", "train")

__all__ = ["__version__", *_HOME, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
