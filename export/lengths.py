"""At which lengths a graph is compared: far beyond every chunk, the least, and between."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from effformer.attention import Core, Mixer
from effformer.calls import Call

from .inputs import Axes, as_it_was, sizes

__all__ = ["Lengths", "Ranges", "candidates", "farther"]

Lengths = dict[str, int]
"""Symbol -> length."""

Ranges = Mapping[str, tuple[int, int | None]]
"""Symbol -> the least and the largest length (None: any) that the tracer holds a graph for."""

_FACTORS = (1.5, 0.5, 1.0, 2.0, 3.0, 4.0)
_MANY = 1024
"""Tokens from which on four times as many take too long."""


def candidates(
    call: Call, axes: Axes, batches: set[str], *, factor: int, ranges: Ranges, least: int
) -> Iterator[list[Lengths]]:
    """For one comparison after the other, the lengths to try until the model takes one.

    First come lengths far beyond the example, then the least, then others around the example. Far
    go the first axis of every tensor that varies beside the batch; all at once, all equally, then
    less far.

    Args:
        call: the example.
        axes: which axes vary.
        batches: symbols that count samples; they are left out.
        factor: how far, in lengths of the example.
        ranges: where the graph is known to hold; its end and what lies behind it come first.
        least: the least length that every symbol may have.
    """
    base = {s: n for s, n in sizes(call, axes).items() if s not in batches}
    if base:
        yield _far(base, _leading(axes, batches), factor, ranges)
        yield [dict.fromkeys(base, n) for n in (1, 2, least)]
    for attempt in range(3 * len(_FACTORS)):
        factors = (_FACTORS[(attempt + i) % len(_FACTORS)] for i in range(len(base)))
        lengths = {s: int(n * f) for (s, n), f in zip(base.items(), factors, strict=True)}
        if all(lengths.values()):
            yield [lengths]


def _leading(axes: Axes, batches: set[str]) -> list[str]:
    """The first symbol of every tensor beside the batch."""
    own = ([s for _, s in sorted(by.items()) if s not in batches] for by in axes.values())
    return list(dict.fromkeys(symbols[0] for symbols in own if symbols))


def _far(base: Lengths, leading: list[str], factor: int, ranges: Ranges) -> list[Lengths]:
    found = []
    for symbol in leading:
        end = ranges.get(symbol, (1, None))[1]
        if end is not None and end < 4 * factor * base[symbol]:
            found += [base | {symbol: end + 1}, base | {symbol: end}]
    for more, f in ((1, factor), (0, factor)):
        found.append(base | {s: base[s] * f + more for s in leading})
    found.append({s: n * factor for s, n in base.items()})
    found += [base | {s: base[s] * f for s in leading} for f in (4, 3, 2) if f < factor]
    return found


def farther(model: nn.Module, call: Call) -> int:
    """How many times longer than the example a sequence must be to lie beyond every length at which
    a part changes its form; 4 at least, less for long examples.

    Runs the model once.
    """
    needed, longest, handles = 1, 1, []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal needed, longest
        if not args:
            return
        n = max(1, args[0].shape[-2])
        longest = max(longest, n)
        for turn in module.turns():  # type: ignore[operator]
            needed = max(needed, math.ceil((2 * turn + 1) / n))

    for module in model.modules():
        if isinstance(module, (Core, Mixer)):
            handles.append(module.register_forward_pre_hook(look))
    try:
        with as_it_was(model):
            call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return max(needed, 4 if longest <= _MANY else 2)
