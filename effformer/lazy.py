"""Tensors whose values are read when somebody asks for them.

A layout renames, cuts, stacks and turns tensors. Given lazy ones it does so to their shapes, and each operator is
written down; the values of one result are then read and computed alone, whatever the size of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["LazyTensor", "values"]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """An operator with its arguments, done at most once for the values of one result."""

    func: Any
    given: tuple[Any, ...]


class LazyTensor(Tensor):
    """A tensor on the CPU that is known by shape and type, and made on demand, each time anew.

    Operators on it give lazy tensors; those that need values (comparisons, copies into other tensors) read
    them.

    Args:
        like: a tensor on the meta device of its shape and type.
        make: gives the values; or the operator that does.
        which: which of the operator's results it is, None for the only one.
    """

    like: Tensor
    make: Callable[[], Tensor] | _Step
    which: int | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls, like: Tensor, make: Callable[[], Tensor] | _Step, which: int | None = None
    ) -> Self:
        made: Self = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        made.like, made.make, made.which = like, make, which
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        step = _Step(func, (args, dict(kwargs or {})))
        shapes = None if func._schema.is_mutable else _shapes(step)
        if shapes is None:
            return _results(step, {})
        if isinstance(shapes, Tensor):
            return cls(shapes, step)
        return type(shapes)(cls(x, step, i) for i, x in enumerate(shapes))


def values(x: Any) -> Any:
    """The values of a lazy tensor; anything else as it is."""
    return _values(x, {})


def _values(x: Any, known: dict[object, Any]) -> Any:
    """Values of a tensor, where the results of some steps are known."""
    if not isinstance(x, LazyTensor):
        return x
    if x.make not in known:
        known[x.make] = _results(x.make, known) if isinstance(x.make, _Step) else x.make()
    return known[x.make] if x.which is None else known[x.make][x.which]


def _results(step: _Step, known: dict[object, Any]) -> Any:
    args, kwargs = tree_map(lambda x: _values(x, known), step.given)
    return step.func(*args, **kwargs)


def _shapes(step: _Step) -> Any:
    """What an operator gives, on the meta device: a tensor or a list of tensors; None for anything else, and
    where it cannot be known without values.
    """
    args, kwargs = tree_map(_on_meta, step.given)
    try:
        out = step.func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        return None
    each = [out] if isinstance(out, Tensor) else out
    plain = isinstance(each, (list, tuple)) and all(isinstance(x, Tensor) for x in each)
    return out if plain and all(x.is_meta for x in each) else None


def _on_meta(x: Any) -> Any:
    if isinstance(x, LazyTensor):
        return x.like
    return x.to("meta") if isinstance(x, Tensor) else x
