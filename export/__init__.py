"""Export to edge runtimes, verified against torch.

Public names are loaded on first use: the runner of a bundle (``python -m effformer.export.run``)
lives here and imports neither torch nor the exporter.
"""

from __future__ import annotations

if not __name__.startswith("effformer."):
    raise ImportError(
        "import effformer.export, not export: a second copy of every class would be loaded"
    )

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .boxes import graph_breakdown as graph_breakdown
    from .bundle import BundleReport as BundleReport
    from .bundle import export_bundle as export_bundle
    from .graph import GraphFacts as GraphFacts
    from .graph import read_graph as read_graph
    from .kinds import open_bundle as open_bundle
    from .onnx import ExportError as ExportError
    from .onnx import ExportReport as ExportReport
    from .onnx import export_onnx as export_onnx
    from .quantize import QuantizeReport as QuantizeReport
    from .quantize import quantize_onnx as quantize_onnx
    from .session import Session as Session
    from .static import Calibration as Calibration
    from .static import calibrate_onnx as calibrate_onnx
    from .stream_bundle import StreamBundleReport as StreamBundleReport
    from .stream_bundle import export_stream_bundle as export_stream_bundle
    from .targets import Target as Target
    from .text_bundle import TextBundleReport as TextBundleReport
    from .text_bundle import export_text_bundle as export_text_bundle
    from .verify import VerificationError as VerificationError
    from .verify import VerifyReport as VerifyReport
    from .verify import verify_onnx as verify_onnx
    from .web import WebReport as WebReport
    from .web import export_web as export_web
    from .within import deviation as deviation
    from .within import quantize_onnx_within as quantize_onnx_within

_HOME = {
    "BundleReport": "bundle", "export_bundle": "bundle", "GraphFacts": "graph",
    "read_graph": "graph", "ExportError": "onnx", "ExportReport": "onnx", "export_onnx": "onnx",
    "QuantizeReport": "quantize", "quantize_onnx": "quantize", "Session": "session",
    "Target": "targets", "VerificationError": "verify", "VerifyReport": "verify",
    "verify_onnx": "verify", "quantize_onnx_within": "within", "Calibration": "static",
    "calibrate_onnx": "static", "deviation": "within", "WebReport": "web", "export_web": "web",
    "open_bundle": "kinds", "StreamBundleReport": "stream_bundle", "export_stream_bundle": "stream_bundle",
    "graph_breakdown": "boxes", "TextBundleReport": "text_bundle", "export_text_bundle": "text_bundle",
}  # fmt: skip

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
