"""Where a graph holds: what the tracer took for granted about the lengths of its example."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from .inputs import Axes
from .lengths import Lengths, Ranges

__all__ = ["conditions_of", "holds", "outside"]

_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_APART = re.compile(r"(!= -?[012]|>=? -?[012])\)?$|^\(?-?[01] <=? ")
"""Tracers set lengths of 0 and 1 apart, whatever the graph does there."""

_PROBES = (2, 3, 4, 5, 7, 8, 12, 16, 33, 64, 100, 128, 150, 255, 512, 1025, 4096)
_LONGEST = 1024
"""Lengths up to which a model is run to see whether its graph fails where it may."""

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Mod: operator.mod,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.USub: operator.neg, ast.Not: operator.not_,
    ast.Pow: lambda x, y: float(x) ** float(y),
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max, "min": min, "float": float, "trunc": math.trunc, "floor": math.floor,
    "ceil": math.ceil,
}  # fmt: skip


def conditions_of(
    program: torch.export.ExportedProgram, axes: Axes, base: Lengths, ranges: Ranges
) -> tuple[str, ...]:
    """The branches on lengths that a trace took, as conditions on symbols such as
    ``height % 4 == 0``; those that ``ranges`` say, and those that hold at all lengths, are left out.

    Args:
        program: the trace.
        axes: which axes vary.
        base: lengths of the example.
        ranges: where the tracer holds the graph, symbol by symbol.
    """
    found: dict[str, None] = {}
    for guard in getattr(program, "_guards_code", None) or ():
        text = _SIZE.sub(lambda m: axes.get(m[1], {}).get(int(m[2]), m[0]), guard)
        text = re.sub(r"torch\.sym_|math\.", "", text)
        for part in text.split(" and "):
            if "L[" not in part and not _APART.search(part):
                found[part] = None
    probes = list(_probes(base, ranges))
    return tuple(c for c in found if any(holds(c, p) is False for p in probes))


def _probes(base: Lengths, ranges: Ranges) -> Iterator[Lengths]:
    """Lengths inside the ranges: every symbol alone, and all of them in pairs."""
    for a, b in product(_PROBES, _PROBES):
        for symbol in base:
            lengths = {s: a if s == symbol else b for s in base}
            inside = all(
                least <= lengths[s] <= (math.inf if most is None else most)
                for s, (least, most) in ranges.items()
            )
            if inside:
                yield lengths


def outside(
    conditions: Sequence[str], ranges: Ranges, base: Lengths, batches: set[str]
) -> dict[str, list[Lengths]]:
    """Condition -> lengths nearest to the example at which it does not hold; none where they are
    too long to try. The ends of the ranges are conditions, too.
    """
    ends = [f"{s} <= {most}" for s, (_, most) in ranges.items() if most is not None]
    found = {}
    for condition in (*ends, *conditions):
        lone = ([{s: n} for n in _around(base[s])] for s in base)
        joint = [{s: n for s in base if s not in batches} for n in range(1, _LONGEST + 1)]
        tried = (base | change for changes in (*lone, joint) for change in changes)
        found[condition] = [lengths for lengths in tried if holds(condition, lengths) is False][:4]
    return found


def _around(n: int) -> list[int]:
    """Lengths, the nearest first."""
    return sorted(range(1, max(_LONGEST, 4 * n) + 2), key=lambda m: (abs(m - n), -m))


def holds(condition: str, lengths: Mapping[str, int]) -> bool | None:
    """Whether a condition holds at some lengths; None if that cannot be told. The text may come from
    a file: it is read as arithmetic, and never executed.
    """
    try:
        return bool(_value(ast.parse(condition, mode="eval").body, lengths))
    except (
        ValueError, SyntaxError, KeyError, TypeError, ArithmeticError, RecursionError, MemoryError,
    ):  # fmt: skip
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
