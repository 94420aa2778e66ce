"""Static quantization of graphs: ranges of activations from calibration data, and QDQ nodes."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effformer.compress.quant.histogram import Histogram
from effformer.compress.samples import Data, batches, check_tensors
from torch import Tensor

from effformer.arguments import checked
from effformer.checks import RunError, need, reason
from effformer.notebook import Shown
from effformer.values import Portion

from .graph import SINGLE_FILE_LIMIT, read_graph
from .products import constant_products, rewritten
from .session import Session

if TYPE_CHECKING:
    import onnx

__all__ = ["Calibration", "calibrate_onnx", "measured", "static_qdq"]

Rule = Literal["minmax", "percentile", "entropy"]
FLOAT32 = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(Shown):
    """Ranges of the activations that the products of a graph are given.

    Attributes:
        ranges: tensor of the graph -> ends of its range, 0 included.
        rule: how the ends were found.
        batches: number of batches that were run.
    """

    ranges: Mapping[str, tuple[float, float]]
    rule: str
    batches: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        ranges = {name: list(ends) for name, ends in self.ranges.items()}
        return {"ranges": ranges, "rule": self.rule, "batches": self.batches}


@checked
def calibrate_onnx(
    path: str | Path,
    data: Data,
    *,
    range: Rule = "percentile",
    percentile: Portion = 0.9999,
) -> Calibration:
    """Run a graph over data and find the ranges of what its products are given.

    Values are counted in histograms, so that memory does not grow with the data.

    Args:
        path: an ONNX file that is not quantized.
        data: batches of named tensors, as the graph's inputs are called; a dict of tensors is cut into
            some. See `effformer.compress.recording` for what a model sees while it is used.
        range: all that was seen ("minmax"), a percentile of it, or the range of least KL divergence
            ("entropy").
        percentile: share of the values inside, for "percentile".

    Raises:
        ValueError: no data, values that are NaN or infinite, or that do not fit the graph; no product
            of the graph has a stored weight.
        TypeError: nothing that holds tensors.
        FormatError: not an ONNX file.
    """
    facts = read_graph(path)
    names = [value.name for value in facts.inputs]
    proto = rewritten(Path(path))
    wanted = [*dict.fromkeys(_inputs_of(proto).values())]
    if not wanted:
        raise ValueError(
            f"calibrate_onnx: {path}: no product of its {facts.nodes} nodes has a stored weight in float32"
        )
    seen, count = {name: Histogram() for name in wanted}, 0
    with tempfile.TemporaryDirectory() as folder:
        session = Session(_observed(proto, wanted, facts.bytes, Path(folder) / "observed.onnx"))
        for count, feed in enumerate(measured(names, data, where="calibrate_onnx: data"), 1):
            found = {**feed, **_run(session, feed, f"calibrate_onnx: data: batch {count - 1}")}
            for name, histogram in seen.items():
                histogram.add(_tensor(found[name], name))
    ranges = {name: one.range(range, 100 * percentile) for name, one in seen.items()}
    return Calibration(ranges=ranges, rule=range, batches=count)


def measured(names: Sequence[str], data: Data, *, where: str) -> Iterator[dict[str, Any]]:
    """Calibration data as inputs of a graph.

    Args:
        names: what the graph takes.
        data: see `calibrate_onnx`; tensors without names go to the inputs in their order.
        where: verb and argument, for messages.

    Raises:
        ValueError: an input is missing, or a value is NaN or infinite; no samples.
        TypeError: nothing that holds tensors.
    """
    for index, batch in enumerate(batches(data, where=where)):
        at = f"{where}: batch {index}"
        given: Any = getattr(batch, "tensors", batch)
        if not isinstance(given, Mapping):
            several = given if isinstance(given, (tuple, list)) else (given,)
            given = dict(zip(names, several, strict=False))
        if missing := [name for name in names if not isinstance(given.get(name), Tensor)]:
            has = ", ".join(map(str, given)) or "nothing"
            raise ValueError(f"{at}: input {missing[0]!r} of the graph is missing; it has {has}")
        feed = {name: given[name] for name in names}
        check_tensors(feed, where=at)
        yield feed


def _run(session: Session, feed: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return session.run(feed)
    except RunError as error:
        raise ValueError(
            f"{where} does not fit the graph: {' '.join(reason(error).split())}"
        ) from error


def _tensor(value: Any, name: str) -> Tensor:
    import torch

    found = value if isinstance(value, Tensor) else torch.from_numpy(value)
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"calibrate_onnx: {name} becomes NaN or infinite on these data; its range would mean nothing"
        )
    return found


def _inputs_of(proto: onnx.ModelProto, keep: Collection[str] = ()) -> dict[str, str]:
    """Products with a stored weight in float32, and what each is given."""
    own = {*constant_products(proto, kinds=(FLOAT32,))} - {*keep}
    return {node.name: node.input[0] for node in proto.graph.node if node.name in own}


def _observed(proto: onnx.ModelProto, wanted: Iterable[str], size: int, file: Path) -> Path:
    """The graph with some of its tensors as further outputs."""
    onnx = need("onnx")
    known = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    more = [name for name in wanted if name not in known]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in more)
    onnx.save(copy, file, save_as_external_data=size > SINGLE_FILE_LIMIT)
    return file


def static_qdq(
    proto: onnx.ModelProto,
    ranges: Mapping[str, tuple[float, float]],
    *,
    signed: bool,
    per_channel: bool,
    reduce_range: bool,
    keep: Collection[str],
) -> onnx.ModelProto:
    """The graph with QuantizeLinear and DequantizeLinear around the products whose weights are stored
    in float32: activations in uint8, weights in int8 or uint8. What products give stays in floating
    point, for their biases and norms.

    Raises:
        ValueError: the ranges are those of another graph.
    """
    import numpy as np

    calibrate = need("onnxruntime.quantization.calibrate")
    kinds = need("onnxruntime.quantization").QuantType
    quantizer = need("onnxruntime.quantization.qdq_quantizer").QDQQuantizer
    products = _inputs_of(proto, keep)
    activations = {*products.values()}
    if not products:  # the quantizer would take no names for all
        return proto
    if lost := [name for name in products.values() if name not in ranges]:
        raise ValueError(
            f"quantize_onnx: data: there is no range of {lost[0]!r}; the calibration is that of another graph"
        )
    known = {value.name for value in (*proto.graph.value_info, *proto.graph.input)}
    typed = need("onnx").helper.make_tensor_value_info
    proto.graph.value_info.extend(
        typed(name, FLOAT32, None) for name in activations if name not in known
    )
    ends = {name: tuple(map(np.float32, ranges[name])) for name in activations}
    spans = calibrate.TensorsData(calibrate.CalibrationMethod.MinMax, ends)
    options = {"OpTypesToExcludeOutputQuantization": ["MatMul"]}
    made = quantizer(
        proto, per_channel, reduce_range, kinds.QInt8 if signed else kinds.QUInt8, kinds.QUInt8, spans,
        [*products], [], ["MatMul"], options,
    )  # fmt: skip
    made.quantize_model()
    done: onnx.ModelProto = made.model.model
    return done
