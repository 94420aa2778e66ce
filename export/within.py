"""`quantize_onnx_within`: quantize a graph, and put products back until a metric keeps its limit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from effformer.compress.quant.control import ControlReport, Goal, control, number
from effformer.compress.samples import Data
from torch import nn

from effformer.arguments import checked
from effformer.calls import Inputs
from effformer.checks import unknown
from effformer.files import check_file, workspace
from effformer.values import NonNegative

from .graph import GRAPH
from .products import products
from .quantize import QUANTIZED, QuantizeReport, quantize_onnx
from .session import Session
from .static import Calibration, calibrate_onnx, measured

__all__ = ["deviation", "quantize_form", "quantize_onnx_within"]

_FEW = 4
"""Calls on which the error of a quantized graph is measured."""

Metric = Callable[[Session], Any]
"""A number for a graph that is ready to run."""


@checked
def quantize_onnx_within(
    path: str | Path,
    out: str | Path,
    metric: Metric,
    scheme: str | Mapping[str, Any] = "dynamic-uint8",
    *,
    data: Data | Calibration | None = None,
    max_drop: NonNegative = 0.01,
    relative: bool = False,
    best: Literal["high", "low"] = "high",
    quick: Metric | None = None,
    force: bool = False,
) -> ControlReport:
    """`quantize_onnx`, and then put products back into floating point until a metric keeps its limit.

    Args:
        path: the file.
        out: where the result goes: new, or an earlier graph of ours, ``path`` included.
        metric: of a `Session`, a number: accuracy, a negative loss, ... `deviation` makes one of data.
        scheme: "dynamic-uint8", "static-int8", "int8", "int4", ..., or options of `quantize_onnx` as a
            dict.
        data: of static schemes, as in `quantize_onnx`; the graph is calibrated once.
        max_drop: by how much the metric may be worse than that of the graph in ``path``.
        relative: ``max_drop`` is a share of that graph's metric.
        best: "high": large values are good; "low": small ones, as of a loss.
        quick: a cheaper metric, by which products are ranked; None: the same.
        force: replace any file.

    Returns:
        The log of all measurements, what was put back and why.

    Raises:
        ValueError: as in `quantize_onnx`; a metric that is no finite number for ``path``, or 0 where the
            drop is a share of it.
        TypeError: a metric that is no number.
        FormatError: not an ONNX file, or ``out`` cannot be written or is something else.
    """
    where = "quantize_onnx_within"
    if isinstance(scheme, str) and scheme not in QUANTIZED:
        raise unknown("scheme", scheme, list(QUANTIZED), where=where)
    options = QUANTIZED[scheme] if isinstance(scheme, str) else {**scheme}
    if own := {"keep", "compared", "data", "force", "path", "out"} & {*options}:
        raise ValueError(f"{where}: scheme: {min(own)} is no option of a scheme")
    check_file(out, GRAPH, force=force)
    if data is not None:
        ranges = data if isinstance(data, Calibration) else calibrate_onnx(path, data)
        options = {**options, "data": ranges}
    goal = Goal(
        reference=number(metric(Session(path))), max_drop=max_drop, relative=relative, best=best
    )
    with workspace(out) as space:

        def measured(by: Metric) -> Callable[[Collection[str]], Any]:
            def measure(back: Collection[str]) -> Any:
                quantize_onnx(path, space / "trial.onnx", keep=sorted(back), force=True, **options)
                return by(Session(space / "trial.onnx"))

            return measure

        cheap = None if quick is None else measured(quick)
        found = control(products(path), measured(metric), goal, quick=cheap)
    back = [one.name for one in found.back]
    report = quantize_onnx(path, out, keep=back, force=force, **options)
    return replace(found, quantized=report)


@checked
def deviation(path: str | Path, data: Data) -> Metric:
    """A metric for `quantize_onnx_within`, with ``best="low"``: ``||y - y0|| / ||y0||`` over all outputs
    y of a graph on data, where y0 are those of the graph in ``path``.

    Args:
        path: the graph that is compared with.
        data: as of `calibrate_onnx`; outputs are kept, so a few batches do.

    Raises:
        ValueError: the data do not fit the graph.
        FormatError: not an ONNX file.
    """
    import numpy as np

    dense = Session(path)
    feeds = list(measured(dense.inputs, data, where="deviation: data"))
    wanted = [dense.run(feed) for feed in feeds]
    total = sum(float(np.square(y, dtype=np.float64).sum()) for one in wanted for y in one.values())

    def metric(session: Session) -> float:
        lost = 0.0
        for feed, outputs in zip(feeds, wanted, strict=True):
            made = session.run(feed)
            lost += sum(
                float(np.square(made[name] - y, dtype=np.float64).sum())
                for name, y in outputs.items()
            )
        return float(np.sqrt(lost / max(total, 1e-30)))

    return metric


def quantize_form(
    path: Path,
    out: Path,
    name: str,
    *,
    data: Any = None,
    max_error: float | None = None,
    compared: tuple[nn.Module, Inputs] | None = None,
    more: dict[str, Any] | None = None,
    force: bool = False,
) -> QuantizeReport:
    """Quantize a graph as one of `QUANTIZED` says, and leave products as they are until the relative error
    of the outputs keeps a limit.

    Args:
        path: the graph.
        out: where the result goes.
        name: the scheme.
        data: what the graph is asked; for static schemes, and for ``max_error``.
        max_error: the limit, None for none.
        compared: see `quantize_onnx`.
        more: further options of `quantize_onnx`.
        force: replace any file.

    Raises:
        ValueError: there is nothing to quantize.
    """
    options, keep = {**QUANTIZED[name], **(more or {})}, []
    if not products(path):
        raise ValueError(
            f"quantize: {name!r} finds no product with a floating-point weight in the graph of this model; leave it "
            "out, for packed layers are exported as they are, or give the model that was not packed"
        )
    if options["scheme"].startswith("static"):
        options["data"] = calibrate_onnx(path, data)
    if max_error is not None:
        ranges = options.pop("data", None)
        some = _spread(data)
        with workspace(out) as space:
            found = quantize_onnx_within(
                path, space / "kept.onnx", deviation(path, some), options, data=ranges,
                max_drop=max_error, best="low",
            )  # fmt: skip
        keep = [one.name for one in found.back]
        options["data"] = ranges
    return quantize_onnx(path, out, **options, keep=keep, compared=compared, force=force)


def _spread(data: Any) -> Any:
    """A few calls of a list of them, over its whole length."""
    if not isinstance(data, list) or len(data) <= _FEW:
        return data
    return [data[i * (len(data) - 1) // (_FEW - 1)] for i in range(_FEW)]
