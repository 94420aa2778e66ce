"""Where a graph holds: what the tracer took for granted about the lengths of its example."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from effformer.calls import Call

from .inputs import Axes, sizes
from .lengths import Lengths, Ranges

__all__ = ["Held", "ends_of", "holds", "names_in", "outside", "read", "where_it_holds", "without"]

Held = tuple[Ranges, tuple[str, ...]]
"""Ranges of symbols, and conditions on them beside, such as ``height % 4 == 0``."""

_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_APART = re.compile(r"(!= [01]|>= 2)\)?$")
"""Tracers set lengths of 0 and 1 apart, whatever the graph does there; it is compared there."""
_REST = re.compile(r"[%&] \d+\)* != [01]\)?$")
"""What looks like it and is none: the rest of a division."""

_PROBES = (2, 3, 4, 5, 7, 8, 12, 16, 33, 64, 100, 128, 150, 255, 512, 1025, 4096)
_NEAR = 32
"""Lengths among which those are looked for at which nothing else is broken."""
_LONGEST = 1024
"""Lengths up to which a model is run to see whether its graph fails where it may."""

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Mod: operator.mod,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.USub: operator.neg, ast.Not: operator.not_,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.Pow: lambda x, y: float(x) ** float(y),
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max, "min": min, "float": float, "trunc": math.trunc, "floor": math.floor,
    "ceil": math.ceil, "round": round, "sqrt": math.sqrt, "abs": abs, "int": int,
}  # fmt: skip


def where_it_holds(program: torch.export.ExportedProgram, call: Call, axes: Axes) -> Held:
    """The branches on lengths that a trace took. What holds at all lengths, or follows from the
    others, is left out.

    Args:
        program: the trace.
        call: its example.
        axes: which axes vary.
    """
    found: dict[str, None] = {}
    for guard in getattr(program, "_guards_code", None) or ():
        text = _SIZE.sub(lambda m: axes.get(m[1], {}).get(int(m[2]), m[0]), guard)
        text = re.sub(r"torch\.(_?sym_)?|math\.", "", text)
        for part in _parts(text):
            apart = _APART.search(part) and not _REST.search(part)
            if "L[" not in part and not apart:
                found[part] = None
    kept: list[str] = []
    ranges = _ranges(program, call, axes, list(found))
    known = ends_of(ranges)
    for condition in sorted(found, key=len):
        if _tells(condition, sizes(call, axes), [*known, *kept]):
            kept.append(condition)
    return ranges, tuple(c for c in found if c in kept)


def _parts(text: str) -> list[str]:
    try:
        tree = read(text)
    except _UNREADABLE:
        return [text]
    both = isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And)
    return [ast.unparse(part) for part in tree.values] if both else [text]  # type: ignore[attr-defined]


def _tells(condition: str, base: Lengths, known: Sequence[str]) -> bool:
    """Whether there are lengths at which all that is known holds and a condition does not; True of
    conditions that cannot be read.
    """
    readable = False
    for lengths in _probes(names_in(condition), base):
        value = holds(condition, lengths)
        readable = readable or value is not None
        if value is False and all(holds(k, lengths) is not False for k in known):
            return True
    return not readable


def _probes(names: Sequence[str], base: Lengths) -> Iterator[Lengths]:
    """Lengths from 2 on: of one symbol all, of more every one alone and all of them in pairs."""
    if len(names) == 1:
        yield from (base | {names[0]: n} for n in range(2, max(_PROBES) + 2))
        return
    for a, b in product(_PROBES, _PROBES):
        yield from ({s: a if s == symbol else b for s in base} for symbol in base)


def _ranges(
    program: torch.export.ExportedProgram, call: Call, axes: Axes, conditions: Sequence[str]
) -> dict[str, tuple[int, int | None]]:
    """Symbol -> least and largest length, None for any. A bound of 2 stands for none, and so does
    one that no condition asks for: tracers set 1 apart whatever the graph does, also as the length
    of what they compute.
    """
    given = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    values = [given[name] for name in program.graph_signature.user_inputs if name in given]
    tensors = [value for value in values if isinstance(value, Tensor)]
    base = sizes(call, axes)
    found: dict[str, tuple[int, int | None]] = {}
    for value, name in zip(tensors, call.tensors, strict=True):
        for axis, symbol in axes.get(name, {}).items():
            size: Any = value.shape[axis]
            bounds = (
                program.range_constraints.get(size.node.expr) if type(size) is not int else None
            )
            if bounds is None:
                continue
            least = int(bounds.lower)
            most = int(bounds.upper) if bounds.upper.is_Integer else None
            if not any(holds(c, base | {symbol: least - 1}) is False for c in conditions):
                least = 2
            if least > 2 or most is not None:
                old = found.get(symbol, (1, None))
                ends = [end for end in (old[1], most) if end is not None]
                found[symbol] = (max(least, old[0]), min(ends, default=None))
    return found


def ends_of(ranges: Ranges) -> list[str]:
    """The ends of ranges as conditions."""
    least = [f"{s} >= {n}" for s, (n, _) in ranges.items() if n > 2]
    return [*least, *(f"{s} <= {n}" for s, (_, n) in ranges.items() if n is not None)]


def without(held: Held, void: Sequence[str]) -> Held:
    """What is left of it when some of `ends_of` and of the conditions are void."""
    ranges = {}
    for symbol, (least, most) in held[0].items():
        low = 2 if f"{symbol} >= {least}" in void else least
        high = None if f"{symbol} <= {most}" in void else most
        if low > 2 or high is not None:
            ranges[symbol] = (low, high)
    return ranges, tuple(c for c in held[1] if c not in void)


def outside(
    conditions: Sequence[str], base: Lengths, batches: set[str]
) -> dict[str, list[Lengths]]:
    """Condition -> lengths nearest to the example at which it does not hold, and of the others as
    many as can be; none where they are too long to try.
    """
    found = {}
    for condition in conditions:
        lone = ([{s: n} for n in _around(base[s])] for s in base)
        joint = [{s: n for s in base if s not in batches} for n in range(1, _LONGEST + 1)]
        tried = (base | change for changes in (*lone, joint) for change in changes)
        broken = (lengths for lengths in tried if holds(condition, lengths) is False)
        beyond = list(islice(broken, _NEAR))
        beyond.sort(key=lambda lengths: sum(holds(c, lengths) is False for c in conditions))
        found[condition] = beyond[:4]
    return found


def _around(n: int) -> list[int]:
    """Lengths, the nearest first."""
    return sorted(range(1, max(_LONGEST, 4 * n) + 2), key=lambda m: (abs(m - n), -m))


_UNREADABLE = (
    ValueError, SyntaxError, KeyError, TypeError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip


@lru_cache(maxsize=256)
def read(condition: str) -> ast.expr:
    """A condition as a tree.

    Raises:
        SyntaxError: it is no expression.
    """
    return ast.parse(condition, mode="eval").body


def names_in(condition: str) -> list[str]:
    """The symbols of a condition, none of one that cannot be read."""
    try:
        nodes = list(ast.walk(read(condition)))
    except _UNREADABLE:
        return []
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    named = (n for n in nodes if isinstance(n, ast.Name) and id(n) not in called)
    return list(dict.fromkeys(n.id for n in named))


def holds(condition: str, lengths: Mapping[str, int]) -> bool | None:
    """Whether a condition holds at some lengths; None if that cannot be told. The text may come from
    a file: it is read as arithmetic, and never executed.
    """
    try:
        return bool(_value(read(condition), lengths))
    except _UNREADABLE:
        return None


def _value(node: ast.AST, lengths: Mapping[str, int]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name):
            return lengths[name]
        case ast.UnaryOp(op=op, operand=x):
            return _OPERATORS[type(op)](_value(x, lengths))
        case ast.BinOp(left=x, op=op, right=y):
            return _OPERATORS[type(op)](_value(x, lengths), _value(y, lengths))
        case ast.Compare(left=x, ops=[op], comparators=[y]):
            return _OPERATORS[type(op)](_value(x, lengths), _value(y, lengths))
        case ast.BoolOp(op=ast.Or(), values=parts):
            return any(_value(part, lengths) for part in parts)
        case ast.BoolOp(values=parts):
            return all(_value(part, lengths) for part in parts)
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]):
            return _FUNCTIONS[name](*(_value(part, lengths) for part in parts))
    raise ValueError(f"no arithmetic: {type(node).__name__}")
