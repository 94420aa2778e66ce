"""Graphs that refuse: what a trace took for granted stands in the graph and stops it elsewhere.

A condition on lengths becomes a `Reshape` of an input to the shape that it has, or, where the
condition does not hold, to one that no tensor has. Every runtime refuses that and prints the name of
the node, which is the sentence. What is computed are single numbers; tensors are not copied.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from effformer.checks import need

from .conditions import names_in, read
from .inputs import Axes

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["BEYOND", "guard", "guard_ids"]

REFUSED = "refused: "
"""What the name of a node begins with; `opened.refusal` looks for it."""

BEYOND = 2**31 - 1
"""An id that no table has, in the place of those below 0."""

_NODES: dict[type[ast.AST], str] = {
    ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Div: "Div", ast.Pow: "Pow",
    ast.Mod: "Mod", ast.FloorDiv: "Div", ast.BitAnd: "BitwiseAnd", ast.BitOr: "BitwiseOr",
    ast.BitXor: "BitwiseXor", ast.Eq: "Equal", ast.NotEq: "Equal", ast.Lt: "Less",
    ast.LtE: "LessOrEqual", ast.Gt: "Greater", ast.GtE: "GreaterOrEqual", ast.USub: "Neg",
    ast.Not: "Not", ast.And: "And", ast.Or: "Or",
}  # fmt: skip
_CALLS = {
    "max": "Max", "min": "Min", "abs": "Abs", "sqrt": "Sqrt", "floor": "Floor", "ceil": "Ceil",
    "round": "Round", "trunc": "", "int": "", "float": "",
}  # fmt: skip
_REAL = (ast.Div, ast.Pow)


class _Unknown(ValueError):
    """A condition without a form in standard operators."""


def guard(
    model: onnx_ir.Model, axes: Axes, conditions: Sequence[str], equal: Sequence[tuple[str, int]]
) -> None:
    """Let a graph refuse lengths.

    Args:
        model: the graph, changed in place; its inputs have the names of ``axes``.
        axes: input -> axis -> symbol.
        conditions: on symbols; those that cannot be written as operators are left out.
        equal: (input, axis) that must be as long as the first axis of the same symbol.
    """
    graph = model.graph
    first = {s: (n, a) for n, by in reversed(axes.items()) for a, s in reversed(by.items())}
    inputs = {str(v.name): v for v in graph.inputs}
    made = _Maker(first, inputs)
    uses = {name: list(inputs[name].uses()) for name in axes}
    outputs = {name: [i for i, v in enumerate(graph.outputs) if v is inputs[name]] for name in axes}
    now = {name: inputs[name] for name in axes}
    for condition in conditions:
        try:
            allowed = made.value(read(condition))
        except _Unknown:
            continue
        name = first[names_in(condition)[0]][0]
        now[name] = made.refusing(now[name], allowed, sentence(condition))
    for name, axis in equal:
        symbol = axes[name][axis]
        allowed = made.op("Equal", made.length(name, axis), made.length(*first[symbol]))
        text = f"{name} must have as many entries of {symbol} as {first[symbol][0]}"
        now[name] = made.refusing(now[name], allowed, text)
    for name, value in now.items():
        for node, index in uses[name] if value is not inputs[name] else ():
            node.replace_input_with(index, value)
        for index in outputs[name] if value is not inputs[name] else ():
            graph.outputs[index] = value
    for value in made.constants.values():
        graph.register_initializer(value)
    if made.nodes:
        graph.insert_before(graph[0], made.nodes) if len(graph) else graph.extend(made.nodes)


def guard_ids(model: onnx_ir.Model) -> None:
    """Let embeddings of a graph's own inputs say which ids they take; others, whose ids the graph
    counts itself, need not look at a sign.

    Args:
        model: the graph, changed in place; its inputs have their names.
    """
    constant = need("onnx_ir").convenience.get_const_tensor
    said = Counter[str]()
    for node in [n for n in model.graph.all_nodes() if n.op_type == "Gather"]:
        table, ids = node.inputs
        within = ids.producer() if ids is not None else None
        if within is None or within.op_type != "Where":
            continue
        below, beyond, given = within.inputs
        number = constant(beyond)
        if number is None or number.size != 1 or number.numpy().item() != BEYOND:
            continue
        names, copied = _origins(given)
        if not names:
            node.replace_input_with(1, given)
            unused = [within, below.producer()] if not ids.uses() else []
            within.graph.remove(unused, safe=True)
            continue
        rows = table.shape[0] if table is not None and table.shape is not None else None
        where = f"in 0 to {rows - 1}" if isinstance(rows, int) else "in the table"
        words = f"{REFUSED}{' and '.join(names)} must {'lie' if copied else 'give rows'} {where}"
        said[words] += 1  # two tables of one size; nodes have names of their own
        node.name = words if said[words] == 1 else f"{words} #{said[words]}"


_MOVES = {
    "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split",
    "Squeeze", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that give whole numbers on as they are, or choose some."""


def _origins(value: onnx_ir.Value) -> tuple[list[str], bool]:
    """The inputs of the graph from whose whole numbers others are made, and whether as copies."""
    whole = (None, need("onnx_ir").DataType.INT64, need("onnx_ir").DataType.INT32)
    found, todo, seen, copied = dict[str, None](), [value], {value}, True
    while todo:
        one = todo.pop()
        made = one.producer()
        if made is None and one.is_graph_input():
            found[str(one.name)] = None
        elif made is not None and made.op_type != "Shape":
            copied = copied and made.op_type in _MOVES
            more = {v for v in made.inputs if v is not None and v.dtype in whole} - seen
            todo += more
            seen |= more
    return sorted(found), copied


def sentence(condition: str) -> str:
    """What a condition asks for, in words where it is a common one."""
    if found := re.fullmatch(r"\(?(\w+) % (\d+)\)? == 0", condition):
        return f"{found[1]} must be a multiple of {found[2]}"
    if found := re.fullmatch(r"(\w+) ([<>])= (\d+)", condition):
        return f"{found[1]} must be at {'most' if found[2] == '<' else 'least'} {found[3]}"
    return f"lengths must satisfy {condition}"


class _Maker:
    """Nodes that compute with lengths, as vectors of one number."""

    def __init__(self, first: dict[str, tuple[str, int]], inputs: dict[str, onnx_ir.Value]) -> None:
        self.ir: Any = need("onnx_ir")
        self.first, self.inputs = first, inputs
        self.nodes: list[onnx_ir.Node] = []
        self.constants: dict[tuple[type, tuple[Any, ...]], onnx_ir.Value] = {}
        self.lengths: dict[tuple[str, int], onnx_ir.Value] = {}

    def op(self, kind: str, *inputs: onnx_ir.Value, name: str = "", **attributes: Any) -> Any:
        """The value of a new node."""
        name = name or f"guard.{len(self.nodes)}"
        node = self.ir.node(kind, inputs, attributes or None, name=name)
        node.outputs[0].name = f"guard.{len(self.nodes)}.value"
        bools = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or")
        types = self.ir.DataType
        node.outputs[0].dtype = (
            types.BOOL if kind in bools else attributes.get("to", inputs[0].dtype)
        )
        node.outputs[0].shape = self.ir.Shape([1])
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, *numbers: float) -> Any:
        """A stored vector, int64 or double."""
        import numpy as np

        key = (type(numbers[0]), numbers)
        if key not in self.constants:
            name = f"guard.constant.{len(self.constants)}"
            tensor = self.ir.tensor(np.array(numbers), name=name)
            value = self.ir.Value(name=name, const_value=tensor, shape=self.ir.Shape(tensor.shape))
            value.dtype = tensor.dtype
            self.constants[key] = value
        return self.constants[key]

    def length(self, name: str, axis: int) -> Any:
        """Number of entries along an axis of an input."""
        if (name, axis) not in self.lengths:
            value = self.op("Shape", self.inputs[name], start=axis, end=axis + 1)
            value.dtype = self.ir.DataType.INT64
            self.lengths[name, axis] = value
        return self.lengths[name, axis]

    def refusing(self, x: onnx_ir.Value, allowed: onnx_ir.Value, text: str) -> Any:
        """x, or an error with a text."""
        assert x.shape is not None
        keep, impossible = (self.constant(*[n] * len(x.shape)) for n in (0, -2))
        shape = self.op("Where", allowed, keep, impossible)
        shape.dtype, shape.shape = keep.dtype, keep.shape
        y = self.op("Reshape", x, shape, name=REFUSED + text)
        y.shape, y.dtype = x.shape, x.dtype
        return y

    def value(self, node: ast.AST) -> Any:
        """A condition, or a part of one.

        Raises:
            _Unknown: it has another form.
        """
        match node:
            case ast.Constant(value=int() | float() as number):
                return self.constant(number)
            case ast.Name(id=name) if name in self.first:
                return self.length(*self.first[name])
            case ast.UnaryOp(op=op, operand=x) if type(op) in _NODES:
                return self.op(_NODES[type(op)], self.value(x))
            case ast.BinOp(left=x, op=op, right=y) if type(op) in _NODES:
                return self._binary(op, self.value(x), self.value(y))
            case ast.Compare(left=x, ops=[op], comparators=[y]) if type(op) in _NODES:
                value = self._binary(op, self.value(x), self.value(y))
                return self.op("Not", value) if isinstance(op, ast.NotEq) else value
            case ast.BoolOp(op=op, values=[x, *rest]):
                value = self.value(x)
                for y in rest:
                    value = self.op(_NODES[type(op)], value, self.value(y))
                return value
            case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in _CALLS:
                return self._call(name, [self.value(part) for part in parts])
        raise _Unknown(type(node).__name__)

    def _real(self, x: onnx_ir.Value) -> Any:
        double = self.ir.DataType.DOUBLE
        return x if x.dtype == double else self.op("Cast", x, to=double)

    def _whole(self, x: onnx_ir.Value) -> Any:
        whole = self.ir.DataType.INT64
        return x if x.dtype == whole else self.op("Cast", x, to=whole)

    def _binary(self, op: ast.AST, x: onnx_ir.Value, y: onnx_ir.Value) -> Any:
        if isinstance(op, _REAL) or x.dtype != y.dtype:
            x, y = self._real(x), self._real(y)
        if not isinstance(op, (ast.Mod, ast.FloorDiv)):
            return self.op(_NODES[type(op)], x, y)
        if x.dtype != self.ir.DataType.INT64:
            raise _Unknown("the rest of a real number")
        y = self.op(
            "Max", y, self.constant(1)
        )  # runtimes crash when they divide a whole number by 0
        rest = self.op("Mod", x, y)
        return rest if isinstance(op, ast.Mod) else self.op("Div", self.op("Sub", x, rest), y)

    def _call(self, name: str, inputs: list[Any]) -> Any:
        if name in ("max", "min"):
            if len({x.dtype for x in inputs}) > 1:
                inputs = [self._real(x) for x in inputs]
            return self.op(_CALLS[name], *inputs)
        if len(inputs) != 1:
            raise _Unknown(f"{name} of {len(inputs)} numbers")
        if name == "abs":
            return self.op("Abs", *inputs)
        x = self._real(inputs[0])
        x = self.op(_CALLS[name], x) if _CALLS[name] else x
        return x if name in ("float", "sqrt") else self._whole(x)
