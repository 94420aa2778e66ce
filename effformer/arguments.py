"""Arguments of public functions: what one accepts stands in its annotations, and is checked in one place."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from .checks import shown
from .values import Check, checker

__all__ = ["Shape", "checked"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Tensors of a shape; axes of one name, and those that "..." stands for, have one length in all
    arguments of a call.

    Attributes:
        axes: as docstrings write it, "(B, C, ...)".
        whole: whole numbers int64 or int32, else real numbers.
        moves: the function brings it to the device of the others.
    """

    axes: str
    whole: bool = False
    moves: bool = False

    def __str__(self) -> str:
        return f"a tensor {self.axes} of {'whole' if self.whole else 'real'} numbers"

    def __call__(self, value: Any, where: str) -> Any:
        self.sizes(value, where)
        return value

    def sizes(self, value: Any, where: str) -> dict[str, Any]:
        """Lengths of the axes by name.

        Raises:
            TypeError: no tensor, or numbers of another kind.
            ValueError: another number of axes.
        """
        import torch  # here, so that the command line can print its help without torch

        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{where}: expected {self}, got {shown(value)}")
        whole = value.dtype in (torch.int64, torch.int32)
        if value.layout != torch.strided or not (
            whole if self.whole else value.is_floating_point()
        ):
            kind = value.dtype if value.layout == torch.strided else value.layout
            raise TypeError(f"{where}: expected {self}, got {kind}")
        named = [name for name in self.axes.strip("()").replace(" ", "").split(",") if name]
        most = None if "..." in named else len(named)
        named = [name for name in named if name != "..."]
        if value.dim() < len(named) or (most is not None and value.dim() > most):
            raise ValueError(f"{where}: expected {self}, got shape {tuple(value.shape)}")
        sizes: dict[str, Any] = dict(zip(named, value.shape, strict=False))
        return sizes if most is not None else {**sizes, "...": tuple(value.shape[len(named) :])}


def checked(function: F) -> F:
    """Decorator of a public function: its arguments are checked against their annotations and handed
    on as the fields of a config are kept. Tensors with a `Shape` must fit each other.

    Costs microseconds, and nothing in a graph. Annotations that only type checkers can see stand for
    anything.
    """
    title = function.__qualname__.removesuffix(".__init__").removesuffix(".__call__")

    def call(*args: Any, **kwargs: Any) -> Any:
        from torch.compiler import is_compiling  # here, for the same reason as in `Shape.sizes`

        if is_compiling():
            return function(*args, **kwargs)
        names, keyed, checks, shapes = _arguments(function)
        kept = [
            checks[name](value, f"{title}: {name}") if name in checks else value
            for name, value in zip(names, args, strict=False)
        ]
        named = {
            name: checks[name](value, f"{title}: {name}") if name in keyed else value
            for name, value in kwargs.items()
        }
        if len(shapes) > 1:
            given = named | dict(zip(names, kept, strict=False))
            _fit({k: (given[k], s) for k, s in shapes.items() if k in given}, title)
        return function(*kept, *args[len(names) :], **named)

    # torch.compile counts its graphs by code, so every function has one of its own
    own = types.FunctionType(
        call.__code__.replace(co_name=function.__name__, co_qualname=function.__qualname__),
        call.__globals__, function.__name__, None, call.__closure__,
    )  # fmt: skip
    return typing.cast(F, functools.update_wrapper(own, function))


@functools.cache
def _arguments(
    function: Callable[..., Any],
) -> tuple[tuple[str, ...], set[str], dict[str, Check], dict[str, Shape]]:
    """Names of the positional arguments, of those that are checked where they are given by name (others
    of the same name belong to ``**kwargs``), checks and shapes of all by name.
    """
    kinds = inspect.Parameter
    own = [
        p for p in inspect.signature(function).parameters.values() if p.kind != kinds.VAR_KEYWORD
    ]
    names = _names(inspect.unwrap(function))
    hints = {p.name: _read(p.annotation, names) for p in own if p.annotation is not kinds.empty}
    shapes = {name: _shape(hint) for name, hint in hints.items()}
    return (
        tuple(p.name for p in own if p.kind not in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL)),
        {p.name for p in own if p.kind != kinds.POSITIONAL_ONLY and p.name in hints},
        {name: checker(hint) for name, hint in hints.items()},
        {name: shape for name, shape in shapes.items() if shape is not None},
    )


def _names(function: Callable[..., Any]) -> dict[str, Any]:
    """What annotations of a function may name: what its module holds, and its class."""
    names: dict[str, Any] = dict(function.__globals__)
    owner: Any = None
    for name in function.__qualname__.split(".")[:-1]:
        owner = names.get(name) if owner is None else getattr(owner, name, None)
    return names | (dict(vars(owner)) if isinstance(owner, type) else {})


def _read(hint: Any, names: dict[str, Any]) -> Any:
    """An annotation that may be written as a string."""
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except NameError:  # imported for type checkers only
        return Any


def _shape(hint: Any) -> Shape | None:
    """The shape that an annotation asks of a tensor, also of one that may be left out."""
    if get_origin(hint) in (Union, types.UnionType):
        return next((found for found in map(_shape, get_args(hint)) if found is not None), None)
    rules = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((rule for rule in rules if isinstance(rule, Shape)), None)


def _fit(given: Mapping[str, tuple[Any, Shape]], title: str) -> None:
    """Refuse tensors whose axes of one name differ, or that lie on different devices."""
    seen: dict[str, tuple[str, Any]] = {}
    for name, (value, shape) in given.items():
        if not hasattr(value, "shape"):  # a number where a tensor may stand
            continue
        facts: dict[str, Any] = shape.sizes(value, name)
        if not shape.moves or value.device.type == "meta":
            facts["device"] = value.device
        for axis, size in facts.items():
            other, had = seen.setdefault(axis, (name, size))
            if had != size:
                both = [f"{one} {tuple(given[one][0].shape)}" for one in (other, name)]
                if axis == "device":
                    both = [f"{other} on {had}", f"{name} on {size}"]
                raise ValueError(f"{title}: {both[0]} and {both[1]} do not fit together")
