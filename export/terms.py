"""Small terms that the optimizer of graphs takes for zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effformer.checks import need

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["keep_small_terms"]

_ZERO = 1e-8
"""onnxscript drops ``x + eps`` and ``x - eps`` up to here as sums with zero; 1e-8 is the epsilon of
many norms, and ``log(x + 1e-9)`` is finite at 0 thanks to it.
"""


def keep_small_terms(graph: onnx_ir.Graph) -> None:
    """Write small constants in sums as vectors of one number, which the optimizer looks past."""
    import numpy as np

    ir = need("onnx_ir")
    for node in list(graph.all_nodes()):
        if node.op_type not in ("Add", "Sub") or node.outputs[0].shape is None:
            continue
        for index, term in enumerate(node.inputs):
            number = _number(term)
            if number is None or not 0 < abs(number) <= _ZERO:
                continue
            made = ir.node("Constant", [], {"value": ir.tensor(np.array([number], np.float32))})
            like = ir.node("CastLike", [made.outputs[0], node.inputs[1 - index]])
            assert node.graph is not None
            node.graph.insert_before(node, [made, like])
            node.replace_input_with(index, like.outputs[0])
            if not len(node.outputs[0].shape):
                _single(node)


def _single(node: onnx_ir.Node) -> None:
    """Let a sum that has become a vector of one number be a single number again."""
    ir = need("onnx_ir")
    value = node.outputs[0]
    flat = ir.node("Squeeze", [value])
    flat.outputs[0].shape, flat.outputs[0].type = value.shape, value.type
    value.replace_all_uses_with(flat.outputs[0], replace_graph_outputs=True)
    flat.replace_input_with(0, value)
    value.shape = ir.Shape([1])
    assert node.graph is not None
    node.graph.insert_after(node, flat)


def _number(value: onnx_ir.Value | None) -> float | None:
    """The floating-point number that a value is, None if it is no constant of one."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Cast", "CastLike"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "Constant":
        return None
    if (number := node.attributes.get("value_float")) is not None:
        return number.as_float()
    tensor = node.attributes.get("value")
    if tensor is None or not tensor.as_tensor().dtype.is_floating_point():
        return None
    array = tensor.as_tensor().numpy()
    return float(array) if array.ndim == 0 else None
