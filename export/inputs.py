"""Example inputs of any module: which tensor is which parameter, and the same call at other
sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effformer.checks import unknown

__all__ = ["Axes", "Call", "Inputs", "bind", "resolve_axes"]

Inputs = Tensor | Sequence[Any] | Mapping[str, Any] | None
"""Arguments of forward: one tensor, positional or keyword arguments; None asks the model for
examples.
"""

Axes = dict[str, dict[int, str]]
"""Input name -> axis -> symbol; equal symbols have equal lengths."""


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call of forward.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments, in the order of the signature.
        positional: parameter names of ``args``.
        tensors: the tensors among them by parameter name, in the order of the signature. Other
            arguments are constants of the graph.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: tuple[str, ...]
    tensors: dict[str, Tensor]

    def with_tensors(self, new: Mapping[str, Tensor]) -> Call:
        """The same call with other tensors."""
        args = tuple(new.get(name, a) for name, a in zip(self.positional, self.args, strict=True))
        kwargs = {name: new.get(name, v) for name, v in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs, tensors=dict(new))

    def run(self, model: nn.Module) -> list[Tensor]:
        """The tensors of the model's output, flattened."""
        with torch.no_grad():
            leaves = pytree.tree_leaves(model(*self.args, **self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def sizes(self, axes: Axes) -> dict[str, int]:
        """Present length of every symbol."""
        return {s: self.tensors[n].shape[a] for n, by in axes.items() for a, s in by.items()}

    def resized(self, axes: Axes, sizes: Mapping[str, int], generator: torch.Generator) -> Call:
        """The call at other lengths, with values drawn from those of each tensor.

        Drawing keeps ids valid and times in their range. Booleans are repeated in their order
        instead, so that a mask with something to attend to in every row stays one.
        """
        new = {}
        for name, old in self.tensors.items():
            shape = list(old.shape)
            for axis, symbol in axes.get(name, {}).items():
                shape[axis] = sizes[symbol]
            if old.dtype == torch.bool:
                new[name] = repeat_to(old, shape)
            else:
                count = torch.Size(shape).numel()
                index = torch.randint(old.numel(), (count,), generator=generator)
                new[name] = old.detach().flatten()[index.to(old.device)].view(shape)
        return self.with_tensors(new)

    def traceable(self, axes: Axes) -> Call:
        """The call with no dynamic axis of length 1, which tracing would take for a constant."""
        new = {}
        for name, old in self.tensors.items():
            shape = [
                max(2, n) if axis in axes.get(name, {}) else n for axis, n in enumerate(old.shape)
            ]
            new[name] = repeat_to(old, shape)
        return self.with_tensors(new)


def repeat_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat (or cut) every axis to a length."""
    for axis, (have, want) in enumerate(zip(x.shape, shape, strict=True)):
        if have != want:
            x = x.index_select(axis, torch.arange(want, device=x.device) % have)
    return x


def bind(model: nn.Module, inputs: Inputs, *, where: str) -> Call:
    """Bind example inputs to the parameters of ``model.forward``.

    Raises:
        TypeError: the inputs do not fit the signature, are nested, or none are given and the model
            has no examples.
    """
    if inputs is None:
        examples = getattr(model, "example_inputs", None)
        if examples is None:
            raise TypeError(
                f"{where}: {type(model).__name__} has no example_inputs(); "
                "give inputs: a tensor, a tuple or a dict"
            )
        inputs = examples(2, generator=torch.Generator().manual_seed(0))
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    else:
        args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(
            f"{where}: inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    for name, value in bound.items():
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)) and not isinstance(
            value, Tensor
        ):
            raise TypeError(
                f"{where}: input {name!r} is a {type(value).__name__} of tensors; a graph takes "
                "tensors by name: wrap the model in a module whose forward takes them one by one"
            )
    tensors = {n: v for n, v in bound.items() if isinstance(v, Tensor)}
    if not tensors:
        raise TypeError(f"{where}: no tensor among the inputs; an exported graph needs one")
    kwargs = {n: kwargs[n] for n in bound if n in kwargs}
    return Call(args, kwargs, tuple(bound)[: len(args)], tensors)


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
        ValueError: an unknown input, an axis that it does not have, or a symbol that is not a name.
    """
    if dynamic is None:
        return {}
    if isinstance(dynamic, str):
        if dynamic != "auto":
            raise ValueError(f"{where}: dynamic is 'auto', None or a dict, got {dynamic!r}")
        own = getattr(model, "dynamic_axes", None)
        if own is not None:
            return {n: dict(by) for n, by in own().items() if n in call.tensors}
        return {n: {0: "batch"} for n, x in call.tensors.items() if x.dim()}
    axes: Axes = {}
    for name, by in dynamic.items():
        if name not in call.tensors:
            raise unknown("input", name, list(call.tensors), where=f"{where}: dynamic")
        for axis, symbol in by.items():
            dims = call.tensors[name].dim()
            if not 0 <= axis < dims:
                raise ValueError(f"{where}: dynamic: {name!r} has axes 0..{dims - 1}, got {axis}")
            if not isinstance(symbol, str) or not symbol.isidentifier():
                raise ValueError(
                    f"{where}: dynamic: {symbol!r} is not a name (axis {axis} of {name!r})"
                )
            axes.setdefault(name, {})[axis] = symbol
    return axes
