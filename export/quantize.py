"""Quantization of ONNX files by ONNX Runtime, failing when nothing was quantized."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from effformer.arguments import checked
from effformer.calls import Inputs
from effformer.checks import need
from effformer.files import check_file, workspace
from effformer.notebook import Shown

from .graph import GRAPH, SINGLE_FILE_LIMIT, read_graph, write_graph
from .verify import VerifyReport, verify_onnx

if TYPE_CHECKING:
    import onnx

__all__ = ["QUANTIZED", "QuantizeReport", "products", "quantize_onnx"]

QuantScheme = Literal["dynamic-uint8", "matmul-nbits"]
QUANTIZED: dict[str, dict[str, Any]] = {
    "dynamic-uint8": {"scheme": "dynamic-uint8"},
    "int8": {"scheme": "matmul-nbits", "bits": 8},
    "int4": {"scheme": "matmul-nbits", "bits": 4},
}
"""Short names of what `export_bundle` and ``effformer export`` do, as options of `quantize_onnx`."""


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


@checked
def quantize_onnx(
    path: str | Path,
    out: str | Path,
    scheme: QuantScheme = "dynamic-uint8",
    *,
    bits: Literal[4, 8] = 8,
    block: Literal[16, 32, 64, 128, 256] = 32,
    symmetric: bool = True,
    accuracy_level: Literal[0, 1, 2, 3, 4] = 0,
    per_channel: bool = True,
    reduce_range: bool = False,
    keep: Collection[str] = (),
    compared: tuple[nn.Module, Inputs] | None = None,
    force: bool = False,
) -> QuantizeReport:
    """Quantize the matrix products of an ONNX file that have a constant weight.

    - "dynamic-uint8": weights and activations in 8 bits, activations on their range at run time.
      Both are unsigned: CPUs with AVX2 and no VNNI add products of unsigned and signed bytes in 16
          bits, which saturates unless weights
      are cut to 7 bits (``reduce_range``); products of unsigned bytes are widened first and need no
      such care.
    - "matmul-nbits": weights in blocks of 4 or 8 bits (com.microsoft.MatMulNBits), activations in
      floating point. Smaller and, with many tokens, slower: DiT-B/2 took 1.6 times as long as in
      float32 on a CPU with AVX2, where dynamic-uint8 took 0.75 times as long.

    Args:
        path: the file.
        out: where the result goes: new, or an earlier graph of ours, ``path`` included.
        scheme: one of these.
        bits: matmul-nbits: bits of a weight.
        block: matmul-nbits: values per scale, 16, 32, 64, 128 or 256.
        symmetric: matmul-nbits: no zero points.
        accuracy_level: matmul-nbits: 0 computes in float32, 4 with activations in 8 bits.
        per_channel: dynamic-uint8: a range for each output channel of a weight.
        reduce_range: dynamic-uint8: 7-bit weights.
        keep: names of products that stay in floating point, see `products`.
        compared: the module that the file was exported from and example inputs, to measure how far
            the quantized graph is from it.
        force: replace any file.

    Raises:
        ValueError: an unknown scheme, an impossible option, or nothing in the graph could be
            quantized.
        FormatError: not an ONNX file, or ``out`` cannot be written or is something else.
        VerificationError: nothing is left of what the model computes: the difference is above the
            largest value.
    """
    check_file(out, GRAPH, force=force)
    before = read_graph(path)
    proto = _rewritten(Path(path))
    if unknown_names := sorted(set(keep) - set(_constant_products(proto))):
        known = ", ".join(_constant_products(proto)[:4])
        raise ValueError(
            f"quantize_onnx: keep: {unknown_names[0]!r} is no product of {path} with a constant weight; "
            f"some of them: {known}"
        )
    with _quiet():
        if scheme == "dynamic-uint8":
            large = before.bytes > SINGLE_FILE_LIMIT
            with workspace(out) as space:
                made = _dynamic(proto, space / "made.onnx", per_channel, reduce_range, large, keep)
            kind = "MatMulInteger"
        else:
            made = _nbits(proto, bits, block, symmetric, accuracy_level, keep)
            kind = "MatMulNBits"
    quantized = sum(n.op_type == kind for n in made.graph.node) - before.operators.get(
        _full(kind), 0
    )
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
        path=Path(out), scheme=scheme, quantized=quantized, left=tuple(_constant_products(made)),
        bytes_before=before.bytes, bytes_after=read_graph(out).bytes, parity=parity,
    )  # fmt: skip


def _full(kind: str) -> str:
    return "com.microsoft::MatMulNBits" if kind == "MatMulNBits" else kind


def _rewritten(path: Path) -> onnx.ModelProto:
    """The model with every Gemm written as MatMul and Add: the quantizers know MatMul only. Products
    without a name of their own get one.
    """
    model = need("onnxruntime.quantization.onnx_model").ONNXModel(need("onnx").load(path))
    model.replace_gemm_with_matmul()
    model.clean_initializers()
    model.topological_sort()
    proto: onnx.ModelProto = model.model
    taken = Counter(node.name for node in proto.graph.node)
    for index, node in enumerate(proto.graph.node):
        if node.op_type == "MatMul" and (not node.name or taken[node.name] > 1):
            node.name = f"MatMul_{index}"
    return proto


def products(path: str | Path) -> list[str]:
    """Names of the products of a graph that `quantize_onnx` can quantize, as it calls them.

    Raises:
        FormatError: not an ONNX file.
    """
    read_graph(path)
    return _constant_products(_rewritten(Path(path)))


def _constant_products(proto: onnx.ModelProto) -> list[str]:
    """Names of the products whose second factor is a stored floating-point tensor."""
    floats = {t.name for t in proto.graph.initializer if t.data_type in (1, 10, 16)}
    nodes = (n for n in proto.graph.node if n.op_type in ("MatMul", "Gemm"))
    return [n.name for n in nodes if n.input[1] in floats]


def _dynamic(
    proto: onnx.ModelProto,
    file: Path,
    per_channel: bool,
    reduce_range: bool,
    large: bool,
    keep: Collection[str],
) -> onnx.ModelProto:
    """Quantized by way of a file: the quantizer returns nothing."""
    quantization = need("onnxruntime.quantization")
    quantization.quantize_dynamic(
        proto, file, op_types_to_quantize=["MatMul"], per_channel=per_channel, reduce_range=reduce_range,
        weight_type=quantization.QuantType.QUInt8, use_external_data_format=large,
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
