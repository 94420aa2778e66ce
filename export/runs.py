"""Calls of a model at other lengths than its example's: those that it takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from math import prod
from typing import Any

import torch
from effformer.compress.quant import PackedWeight
from torch import Tensor, nn

from effformer.calls import Call

from .conditions import ends_of, holds, outside
from .inputs import Axes, as_it_was, resized, sizes
from .lengths import Lengths, Ranges, candidates, farther

__all__ = [
    "Run",
    "TooFewError",
    "least_lengths",
    "other_runs",
    "other_sides",
    "quiet_run",
    "shaken_runs",
    "unequal_axes",
]

Run = tuple[Lengths, Call, list[Tensor]]
"""Lengths, the call at them, and what the model gives."""

_MANY = 2**20
"""Elements of the inputs up to which a model runs at lengths for the sake of one branch."""
_BATCHES = (1, 3, 2)
_ERRORS = 8
"""By how many rounding errors what a layer is given may be off: those of long sums in another order."""
_REFUSALS = (ValueError, RuntimeError, AssertionError, IndexError)


class TooFewError(ValueError):
    """A model takes fewer lengths than are wanted."""


def other_runs(
    model: nn.Module,
    call: Call,
    axes: Axes,
    ranges: Ranges,
    conditions: Sequence[str],
    traced: Lengths,
    draws: torch.Generator,
) -> Iterator[Run]:
    """The run of the example, and then runs at lengths other than its own and the traced ones, or with
    other values if no length varies, without end.

    Raises:
        TooFewError: the model takes no others.
    """
    base = sizes(call, axes)
    yield base, call, quiet_run(model, call)
    while not base:
        other = resized(call, axes, base, draws)
        yield {}, other, quiet_run(model, other)
    batches = _batches(axes)
    seen, error = [base | traced], None
    factor, least = farther(model, call), _least(base, [*ends_of(ranges), *conditions])
    for choices in candidates(call, axes, batches, factor=factor, ranges=ranges, least=least):
        for choice in choices:
            batch = _BATCHES[(len(seen) - 1) % len(_BATCHES)]
            lengths = choice | dict.fromkeys(batches, batch)
            if lengths in seen:
                most = max((s[b] for s in seen for b in batches), default=0)
                lengths |= dict.fromkeys(batches, most + 1)
            if lengths in seen:
                continue
            other = resized(call, axes, lengths, draws)
            try:
                expected = quiet_run(model, other)
            except _REFUSALS as refused:
                error = refused
                continue
            seen.append(lengths)
            yield lengths, other, expected
            break
    raise TooFewError(
        f"{type(model).__name__} itself runs at only {len(seen) - 1} other lengths of "
        f"{', '.join(base)}, which the graph declares dynamic; the last error: {error}"
    ) from error


def _least(base: Lengths, conditions: Sequence[str]) -> int:
    """The least length from 3 on at which all conditions hold, if every symbol has it."""
    ones = (n for n in range(3, 65) if all(holds(c, dict.fromkeys(base, n)) for c in conditions))
    return next(ones, 3)


def other_sides(
    model: nn.Module,
    call: Call,
    axes: Axes,
    conditions: Sequence[str],
    draws: torch.Generator,
    seen: Sequence[Lengths] = (),
) -> Iterator[Run]:
    """Runs at lengths at which what the tracer took for granted does not hold, if the model runs
    there and none of those in ``seen``, or of the runs before, is one.
    """
    found = list(seen)
    for condition, choices in outside(conditions, sizes(call, axes), _batches(axes)).items():
        for lengths in choices:
            if any(holds(condition, some) is False for some in found):
                break
            if _elements(call, axes, lengths) > max(_MANY, 4 * _elements(call, axes, {})):
                continue
            other = resized(call, axes, lengths, draws)
            try:
                expected = quiet_run(model, other)
            except _REFUSALS:
                continue
            found.append(lengths)
            yield lengths, other, expected


def least_lengths(
    model: nn.Module, call: Call, axes: Axes, conditions: Sequence[str], draws: torch.Generator
) -> tuple[str, ...]:
    """Further conditions that keep out lengths of 1 where the model refuses them, of which tracers
    know nothing: of every symbol alone, and of all beside the batch.
    """
    base = sizes(call, axes)
    inner = [symbol for symbol in base if symbol not in _batches(axes)]
    ones = {symbol: base | {symbol: 1} for symbol in base}
    if len(inner) > 1:
        ones[f"max({', '.join(inner)})"] = base | dict.fromkeys(inner, 1)
    found: list[str] = []
    for what, lengths in ones.items():
        known = all(holds(c, lengths) is not False for c in (*conditions, *found))
        if known and not _takes(model, resized(call, axes, lengths, draws)):
            found.append(f"{what} >= 2")
    return tuple(found)


def unequal_axes(
    model: nn.Module, call: Call, axes: Axes, draws: torch.Generator
) -> list[tuple[str, int]]:
    """Axes (input, axis) that must be as long as others of their symbol, because the model refuses
    one entry there instead of repeating it.
    """
    base, seen, found = sizes(call, axes), set(), []
    for name, by in axes.items():
        for axis, symbol in by.items():
            if symbol in seen:
                apart = {**axes, name: by | {axis: f"{name} {axis}"}}
                other = resized(call, apart, base | {f"{name} {axis}": 1}, draws)
                if not _takes(model, other):
                    found.append((name, axis))
            seen.add(symbol)
    return found


def quiet_run(model: nn.Module, call: Call) -> list[Tensor]:
    """One run does not find what another has left behind."""
    with as_it_was(model):
        return call.run(model)


def shaken_runs(model: nn.Module, call: Call) -> Generator[list[Tensor], None, None]:
    """What a model with packed layers that round what they are given returns when rounding errors
    are added to that, and to its inputs, other ones in every run; nothing of another model.
    """
    rounding = [m for m in model.modules() if isinstance(m, PackedWeight) and m.scheme.step]
    draws = torch.Generator().manual_seed(0)

    def off(x: Tensor, errors: int) -> Tensor:
        if not x.is_floating_point() or not x.numel():
            return x
        size = errors * torch.finfo(x.dtype).eps * x.abs().amax(-1, keepdim=True)
        return x + size * torch.randn(x.shape, generator=draws).to(x)

    def shake(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (off(args[0], _ERRORS), *args[1:])

    hooks = [layer.register_forward_pre_hook(shake) for layer in rounding]
    try:
        while hooks:
            yield quiet_run(model, call.map(lambda x: off(x, 1)))
    finally:
        for hook in hooks:
            hook.remove()


def _takes(model: nn.Module, call: Call) -> bool:
    try:
        quiet_run(model, call)
    except _REFUSALS:
        return False
    return True


def _batches(axes: Axes) -> set[str]:
    return {by[0] for by in axes.values() if 0 in by}


def _elements(call: Call, axes: Axes, lengths: Lengths) -> int:
    """Elements of the inputs, at other lengths of some symbols."""
    return sum(
        prod(lengths.get(axes.get(name, {}).get(axis, ""), n) for axis, n in enumerate(x.shape))
        for name, x in call.tensors.items()
    )
