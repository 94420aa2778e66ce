"""Quantization of ONNX files by ONNX Runtime, failing when nothing was quantized."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from effformer.compress.samples import Data
from torch import nn

from effformer.arguments import checked
from effformer.calls import Inputs
from effformer.checks import need, unknown
from effformer.files import check_file, workspace
from effformer.notebook import Shown
from effformer.profile import machine

from .graph import GRAPH, SINGLE_FILE_LIMIT, read_graph, write_graph
from .products import constant_products, rewritten
from .static import Calibration, calibrate_onnx, static_qdq
from .verify import VerifyReport, verify_onnx

if TYPE_CHECKING:
    import onnx

__all__ = ["FORMS", "QUANTIZED", "QuantizeReport", "named_form", "quantize_onnx"]

QuantScheme = Literal[
    "dynamic", "dynamic-uint8", "dynamic-int8", "static", "static-uint8", "static-int8", "matmul-nbits"
]  # fmt: skip
QUANTIZED: dict[str, dict[str, Any]] = {
    **{name: {"scheme": name} for name in get_args(QuantScheme) if name != "matmul-nbits"},
    "dynamic-int7": {"scheme": "dynamic-int8", "reduce_range": True},
    "static-int7": {"scheme": "static-int8", "reduce_range": True},
    "int8": {"scheme": "matmul-nbits", "bits": 8},
    "int4": {"scheme": "matmul-nbits", "bits": 4},
}
"""Short names of what `export_bundle` and ``effformer export`` do, as options of `quantize_onnx`."""
FORMS = ("float32", *QUANTIZED)
"""Forms of a graph in a bundle: as the model is, and quantized."""
_KNOBS = {
    "matmul": ("block", "symmetric", "accuracy_level"), "dynamic": ("per_channel", "reduce_range"),
    "static": ("per_channel", "reduce_range"),
}  # fmt: skip
"""Options of a form, by the beginning of its scheme."""
WIDE = ("avx512_vnni", "avx_vnni", "asimddp")
"""Flags of processors that add products of unsigned and signed bytes in 32 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeReport(Shown):
    """What `quantize_onnx` did.

    Attributes:
        path: the quantized file.
        scheme: the scheme.
        quantized: number of products with a quantized weight.
        left: names of the products with a constant weight that stay in floating point.
        bytes_before: size of the file that was read.
        bytes_after: size of the file that was written.
        parity: the comparison of the written file with the model, None if there was none.
    """

    path: Path
    scheme: str
    quantized: int
    left: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    parity: VerifyReport | None = None

    @property
    def ratio(self) -> float:
        """Size after by size before."""
        return self.bytes_after / self.bytes_before

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": str(self.path), "scheme": self.scheme, "quantized": self.quantized,
            "left": list(self.left),
            "bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "ratio": self.ratio,
            "parity": None if self.parity is None else self.parity.to_dict(),
        }  # fmt: skip


def named_form(given: str | Mapping[str, Any], *, where: str) -> tuple[str, dict[str, Any]]:
    """A form and its options: ``"int4"``, or ``{"name": "int4", "block": 64}``.

    Raises:
        ValueError: an unknown form, or an option that it has not.
    """
    options = {"name": given} if isinstance(given, str) else dict(given)
    name = options.pop("name", None)
    if name not in FORMS:
        raise unknown("form", str(name), FORMS, where=where)
    kind = "" if name == "float32" else QUANTIZED[name]["scheme"].partition("-")[0]
    if options and not kind:
        raise ValueError(f"{where}: {name!r} has no options, got {', '.join(map(str, options))}")
    for option in options:
        if option not in _KNOBS.get(kind, ()):
            raise unknown(f"option of {name!r}", str(option), _KNOBS.get(kind, ()), where=where)
    return name, options


@checked
def quantize_onnx(
    path: str | Path,
    out: str | Path,
    scheme: QuantScheme = "dynamic-uint8",
    *,
    data: Data | Calibration | None = None,
    bits: Literal[4, 8] = 8,
    block: Literal[16, 32, 64, 128, 256] = 32,
    symmetric: bool = True,
    accuracy_level: Literal[0, 1, 2, 3, 4] = 0,
    per_channel: bool = True,
    reduce_range: bool | Literal["auto"] = "auto",
    keep: Collection[str] = (),
    compared: tuple[nn.Module, Inputs] | None = None,
    force: bool = False,
) -> QuantizeReport:
    """Quantize the matrix products of an ONNX file that have a constant weight.

    - "dynamic-uint8", "dynamic-int8": weights in 8 bits, activations in uint8 on their range at run time.
    - "static-uint8", "static-int8": the same with ranges of activations from calibration data
      (QuantizeLinear and DequantizeLinear around the products); see `calibrate_onnx`.
    - "dynamic", "static": with weights in int8 if this machine's CPU has VNNI, else in uint8. CPUs
      without VNNI (AVX2 alone) add products of unsigned and signed bytes in 16 bits, which saturates
      unless weights are cut to 7 bits (``reduce_range``); products of unsigned bytes are widened first
      and need no such care.
    - "matmul-nbits": weights in blocks of 4 or 8 bits (com.microsoft.MatMulNBits), activations in
      floating point. Smaller and, with many tokens, slower: DiT-B/2 took 1.6 times as long as in
      float32 on a CPU with AVX2, where dynamic-uint8 took 0.75 times as long.

    Args:
        path: the file.
        out: where the result goes: new, or an earlier graph of ours, ``path`` included.
        scheme: one of these.
        data: static: batches of named tensors, as the graph's inputs are called, or what
            `calibrate_onnx` has made of some.
        bits: matmul-nbits: bits of a weight.
        block: matmul-nbits: values per scale, 16, 32, 64, 128 or 256.
        symmetric: matmul-nbits: no zero points.
        accuracy_level: matmul-nbits: 0 computes in float32, 4 with activations in 8 bits.
        per_channel: dynamic, static: a range for each output channel of a weight.
        reduce_range: dynamic, static: 7-bit weights; "auto": if they are int8 and this machine's CPU has
            no VNNI. Say it where the graph is going to run on another CPU than this one.
        keep: names of products that stay in floating point, see `effformer.export.products`.
        compared: the module that the file was exported from and example inputs, to measure how far
            the quantized graph is from it.
        force: replace any file.

    Raises:
        ValueError: an unknown scheme, an impossible option, or nothing in the graph could be
            quantized; a static scheme without data, or data that do not fit the graph.
        FormatError: not an ONNX file, or ``out`` cannot be written or is something else.
        VerificationError: nothing is left of what the model computes: the difference is above the
            largest value.
    """
    check_file(out, GRAPH, force=force)
    before = read_graph(path)
    kind, _, weights = scheme.partition("-")
    if kind != "matmul":
        weights = weights or ("int8" if _adds_wide() else "uint8")
        scheme = f"{kind}-{weights}"  # type: ignore[assignment]
    narrow = weights == "int8" and not _adds_wide() if reduce_range == "auto" else reduce_range
    if (kind == "static") == (data is None):
        raise ValueError(
            "quantize_onnx: static schemes take ranges from data; give data="
            if data is None
            else f"quantize_onnx: data means nothing to {scheme!r}; leave it out"
        )
    proto = rewritten(Path(path))
    if unknown_names := sorted(set(keep) - set(constant_products(proto))):
        known = ", ".join(constant_products(proto)[:4])
        raise ValueError(
            f"quantize_onnx: keep: {unknown_names[0]!r} is no product of {path} with a constant weight; "
            f"some of them: {known}"
        )
    given: dict[str, Any] = {"per_channel": per_channel, "reduce_range": narrow, "keep": keep}
    had = _quantized(proto)
    with _quiet():
        if kind == "static":
            ranges = data if isinstance(data, Calibration) else calibrate_onnx(path, data)  # type: ignore[arg-type]
            made = static_qdq(proto, ranges.ranges, signed=weights == "int8", **given)
        elif kind == "dynamic":
            large = before.bytes > SINGLE_FILE_LIMIT
            with workspace(out) as space:
                made = _dynamic(proto, space / "made.onnx", weights == "int8", large, **given)
        else:
            made = _nbits(proto, bits, block, symmetric, accuracy_level, keep)
    quantized = _quantized(made) - had
    if quantized == 0 and not keep:
        common = ", ".join(f"{n} {op}" for op, n in list(before.operators.items())[:4])
        raise ValueError(
            f"quantize_onnx: {path}: nothing was quantized; no product of its {before.nodes} "
            f"nodes ({common}, ...) has a constant floating-point weight"
        )
    need("onnx").helper.set_model_props(made, {**before.metadata, "effformer.quantization": scheme})

    def check(file: Path) -> VerifyReport | None:
        if compared is None:
            return None
        return replace(verify_onnx(file, *compared, tolerance=1.0), path=Path(out))

    parity = write_graph(need("onnx_ir").from_proto(made), out, check, force=force)
    return QuantizeReport(
        path=Path(out), scheme=scheme, quantized=quantized, left=tuple(constant_products(made)),
        bytes_before=before.bytes, bytes_after=read_graph(out).bytes, parity=parity,
    )  # fmt: skip


def _adds_wide() -> bool:
    """Whether products of unsigned and signed bytes do not saturate here."""
    place = machine()
    return not {"avx2", "avx512f"} & {*place.flags} or bool({*WIDE} & {*place.flags})


def _quantized(proto: onnx.ModelProto) -> int:
    """Number of products whose weight is quantized."""
    decoded = {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    kinds = ("MatMulInteger", "MatMulNBits")
    return sum(
        node.op_type in kinds or (node.op_type == "MatMul" and {*node.input} <= decoded)
        for node in proto.graph.node
    )


def _dynamic(
    proto: onnx.ModelProto,
    file: Path,
    signed: bool,
    large: bool,
    *,
    per_channel: bool,
    reduce_range: bool,
    keep: Collection[str],
) -> onnx.ModelProto:
    """Quantized by way of a file: the quantizer returns nothing."""
    quantization = need("onnxruntime.quantization")
    kinds = quantization.QuantType
    quantization.quantize_dynamic(
        proto, file, op_types_to_quantize=["MatMul"], per_channel=per_channel, reduce_range=reduce_range,
        weight_type=kinds.QInt8 if signed else kinds.QUInt8, use_external_data_format=large,
        nodes_to_exclude=[*keep],
    )  # fmt: skip
    made: onnx.ModelProto = need("onnx").load(file)
    return made


def _nbits(
    proto: onnx.ModelProto,
    bits: int,
    block: int,
    symmetric: bool,
    accuracy_level: int,
    keep: Collection[str],
) -> onnx.ModelProto:
    module = need("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = module.MatMulNBitsQuantizer(
        proto, bits=bits, block_size=block, is_symmetric=symmetric, accuracy_level=accuracy_level,
        op_types_to_quantize=("MatMul",), nodes_to_exclude=[*keep],
    )  # fmt: skip
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizers' advice out of the log, and the handlers that they install out of the
    process.
    """
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
