"""Bundles of any kind."""

from __future__ import annotations

from pathlib import Path

from effformer.arguments import checked
from effformer.values import Threads

from . import facts as checks
from .opened import kind_of
from .run import Bundle
from .streams import StreamBundle
from .texts import TextBundle

__all__ = ["open_bundle"]


@checked
def open_bundle(
    folder: str | Path, threads: Threads | None = None
) -> Bundle | StreamBundle | TextBundle:
    """Open a bundle of whatever kind it is.

    Args:
        folder: what `export_bundle`, `export_text_bundle` or `export_stream_bundle` wrote.
        threads: threads of ONNX Runtime, None: as the bundle says.

    Raises:
        BundleError: no bundle, an incomplete or damaged one, or one of a newer format.
    """
    kinds: tuple[type[Bundle | StreamBundle | TextBundle], ...] = (
        Bundle,
        StreamBundle,
        TextBundle,
    )
    kind = kind_of(checks.read_facts(Path(folder)))
    return next(one for one in kinds if kind == one.KIND)(folder, threads)
