"""Whether the graph that is captured may hold operators of ONNX Runtime beside the standard ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["MICROSOFT", "capturing_for", "gathers", "node_domains"]

MICROSOFT = "com.microsoft"
"""The operators that ONNX Runtime adds."""

_CAPTURES: list[tuple[str, ...]] = []


@contextmanager
def capturing_for(domains: tuple[str, ...]) -> Iterator[None]:
    """Parts captured inside may emit operators of these domains; `torch.export` alone does not know
    that its graph becomes an ONNX file.
    """
    _CAPTURES.append(domains)
    try:
        yield
    finally:
        _CAPTURES.pop()


def node_domains() -> tuple[str, ...] | None:
    """Domains beside the standard one that the ONNX graph being captured may use; None if none is
    captured.
    """
    if _CAPTURES:
        return _CAPTURES[-1]
    return (MICROSOFT,) if torch.onnx.is_in_onnx_export() else None


def gathers() -> bool:
    """Whether parts that skip work shall gather what they work on in the graph that is captured: ONNX
    graphs may hold tensors whose lengths depend on values.
    """
    return node_domains() is not None
