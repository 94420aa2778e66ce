"""What a graph takes: named tensors, which of their axes may vary, the same call at other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effformer.calls import Call, Inputs, bind
from effformer.checks import unknown

__all__ = [
    "Axes", "as_it_was", "changes", "graph_call", "resized", "resolve_axes", "rewritten", "sizes",
    "traceable",
]  # fmt: skip

Axes = dict[str, dict[int, str]]
"""Input name -> axis -> symbol; equal symbols have equal lengths."""


def graph_call(model: nn.Module, inputs: Inputs | None, *, where: str) -> Call:
    """Bind example inputs, of which every tensor must have a name; see `effformer.calls.bind`.

    Raises:
        TypeError: the inputs do not fit the signature, are nested or sparse, or none are given and the
            model has no examples.
        ValueError: one is empty.
    """
    call = bind(model, inputs, where=where, batch=2)
    own = inspect.signature(model.forward).parameters
    for name, value in call.arguments.items():
        nested = not isinstance(value, Tensor) and any(
            isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)
        )
        if nested or (isinstance(value, Tensor) and name not in own):
            what = f"a {type(value).__name__} of tensors" if nested else "no argument of its own"
            raise TypeError(
                f"{where}: input {name!r} is {what}; a graph takes "
                "tensors by name: wrap the model in a module whose forward takes them one by one"
            )
    if not call.tensors:
        raise TypeError(f"{where}: no tensor among the inputs; an exported graph needs one")
    for name, x in call.tensors.items():
        if x.layout != torch.strided:
            raise TypeError(f"{where}: input {name!r} is {x.layout}; give a dense tensor")
        if not x.numel():
            raise ValueError(
                f"{where}: input {name!r} of shape {tuple(x.shape)} is empty; give at least one sample "
                "of every length"
            )
    return call


State = list[tuple[dict[Any, Any], dict[Any, Any]]]
"""Every dict that the modules of a model keep, and a copy of it."""


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Attributes that modules set inside, such as caches for the number of tokens, are undone."""
    before = _state(model)
    try:
        yield
    finally:
        for place, values in before:
            if not _same(place, values):
                place.clear()
                place.update(values)


def rewritten(model: nn.Module, call: Call) -> list[str]:
    """Run a model; names of the buffers that it changes in place, of which a graph knows nothing."""
    before = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
    call.run(model)
    return [name for name, (buffer, version) in before.items() if buffer._version != version]


def changes(model: nn.Module, call: Call) -> bool:
    """Run a model; True if its modules keep something else afterwards."""
    before = _state(model)
    call.run(model)
    same = all(_same(place, values) for place, values in before)
    return not same or len(_state(model)) != len(before)


def _state(model: nn.Module) -> State:
    places: list[dict[Any, Any]] = []
    for module in model.modules():
        own = vars(module)
        places += [own, *(value for value in own.values() if type(value) is dict)]
    return [(place, dict(place)) for place in places]


def _same(place: dict[Any, Any], values: dict[Any, Any]) -> bool:
    return place.keys() == values.keys() and all(place[k] is v for k, v in values.items())


def sizes(call: Call, axes: Axes) -> dict[str, int]:
    """Present length of every symbol."""
    tensors = call.tensors
    return {s: tensors[n].shape[a] for n, by in axes.items() for a, s in by.items()}


def resized(call: Call, axes: Axes, to: Mapping[str, int], generator: torch.Generator) -> Call:
    """The call at other lengths, with values drawn from those of each tensor.

    Drawing keeps ids valid and times in their range. Booleans are repeated in their order instead,
    so that a mask with something to attend to in every row stays one.
    """
    new = {}
    for name, old in call.tensors.items():
        shape = list(old.shape)
        for axis, symbol in axes.get(name, {}).items():
            shape[axis] = to[symbol]
        if old.dtype == torch.bool:
            new[name] = _repeated(old, shape)
        else:
            count = torch.Size(shape).numel()
            index = torch.randint(old.numel(), (count,), generator=generator)
            new[name] = old.detach().flatten()[index.to(old.device)].view(shape)
    return call.with_tensors(new)


def traceable(call: Call, axes: Axes) -> Call:
    """The call with no dynamic axis of length 1, which tracing would take for a constant."""
    new = {}
    for name, old in call.tensors.items():
        varying = axes.get(name, {})
        shape = [max(2, n) if axis in varying else n for axis, n in enumerate(old.shape)]
        new[name] = _repeated(old, shape)
    return call.with_tensors(new)


def _repeated(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat (or cut) every axis to a length."""
    for axis, (have, want) in enumerate(zip(x.shape, shape, strict=True)):
        if have != want:
            x = x.index_select(axis, torch.arange(want, device=x.device) % have)
    return x


def resolve_axes(
    model: nn.Module,
    call: Call,
    dynamic: Mapping[str, Mapping[int, str]] | str | None,
    *,
    where: str,
) -> Axes:
    """Which axes may vary.

    Args:
        model: the module.
        call: its example inputs.
        dynamic: "auto": ``model.dynamic_axes()``, or axis 0 of every tensor is "batch"; None:
            nothing varies; or input name -> axis -> symbol.
        where: prefix of messages.

    Raises:
        ValueError: an unknown input, an axis that it does not have or that this model fixes, or a
            symbol that is not a name.
    """
    if dynamic is None:
        return {}
    given, own = call.tensors, getattr(model, "dynamic_axes", None)
    if isinstance(dynamic, str):
        if dynamic != "auto":
            raise ValueError(f"{where}: dynamic is 'auto', None or a dict, got {dynamic!r}")
        if own is not None:
            return {n: dict(by) for n, by in own().items() if n in given}
        return {n: {0: "batch"} for n, x in given.items() if x.dim()}
    varying = {} if own is None else own()
    axes: Axes = {}
    for name, by in dynamic.items():
        if name not in given:
            raise unknown("input", name, list(given), where=f"{where}: dynamic")
        for axis, symbol in by.items():
            dims = given[name].dim()
            if not 0 <= axis < dims:
                raise ValueError(f"{where}: dynamic: {name!r} has axes 0..{dims - 1}, got {axis}")
            if not isinstance(symbol, str) or not symbol.isidentifier():
                raise ValueError(
                    f"{where}: dynamic: {symbol!r} is not a name (axis {axis} of {name!r})"
                )
            if axis not in varying.get(name, by):
                raise ValueError(
                    f"{where}: dynamic: axis {axis} of {name!r} is fixed in this model, as its "
                    f"dynamic_axes() say; axes that vary: {varying}"
                )
            axes.setdefault(name, {})[axis] = symbol
    return axes
