"""Graphs as the quantizers of ONNX Runtime want them: products as MatMul, each with a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from effformer.checks import need

from .graph import read_graph

if TYPE_CHECKING:
    import onnx

__all__ = ["constant_products", "products", "rewritten"]

_FLOATS = (1, 10, 16)


def rewritten(path: Path) -> onnx.ModelProto:
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
    return constant_products(rewritten(Path(path)))


def constant_products(proto: onnx.ModelProto, kinds: Collection[int] = _FLOATS) -> list[str]:
    """Names of the products whose second factor is a stored tensor of such types of ONNX."""
    floats = {t.name for t in proto.graph.initializer if t.data_type in kinds}
    nodes = (n for n in proto.graph.node if n.op_type in ("MatMul", "Gemm"))
    return [n.name for n in nodes if n.input[1] in floats]
