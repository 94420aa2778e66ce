"""Values of options and arguments: what a field or a public function accepts stands in its type, and
is checked in one place.

``features: Count | None = None`` says that a number must be at least 1 where there is one. A plain
``int`` or ``float`` is any finite number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from .checks import shown, unknown

__all__ = [
    "QUIET",
    "Chance",
    "Check",
    "Checked",
    "Count",
    "Depth",
    "Even",
    "Fraction",
    "Natural",
    "NonNegative",
    "Odd",
    "Portion",
    "Positive",
    "Range",
    "Real",
    "Seed",
    "Threads",
    "Times",
    "Warmup",
    "checker",
    "held",
    "plain",
]  # fmt: skip

Check = Callable[[Any, str], Any]
"""(value, its place in words) -> the value as it is kept; refuses what does not fit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers between two ends.

    Attributes:
        low: smallest number.
        high: largest number.
        above: ``low`` itself is excluded.
        below: ``high`` itself is excluded.
        step: distance of the numbers from ``low`` on; 0 for all of them.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    step: int = 0

    def __contains__(self, value: float) -> bool:
        return (
            -math.inf < value < math.inf
            and (value > self.low if self.above else value >= self.low)
            and (value < self.high if self.below else value <= self.high)
            and (not self.step or (value - self.low) % self.step == 0)
        )

    def __str__(self) -> str:
        if self.step:
            return f"be one of {', '.join(f'{self.low + i * self.step:g}' for i in range(3))}, ..."
        if self.high < math.inf and self.low > -math.inf:
            ends = "(" if self.above else "[", ")" if self.below else "]"
            low, high = (f"{int(n)}" if n == int(n) else f"{n:g}" for n in (self.low, self.high))
            return f"lie in {ends[0]}{low}, {high}{ends[1]}"
        if self.high < math.inf:
            return f"be below {self.high:g}" if self.below else f"be at most {self.high:g}"
        if self.low > -math.inf:
            positive = "be positive" if self.low == 0 else f"be above {self.low:g}"
            return positive if self.above else f"be at least {self.low:g}"
        return "be finite"


Natural = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
Depth = Annotated[int, Range(1, 4096)]  # a mistyped number of blocks would fill the memory
Threads = Annotated[int, Range(1, 1024)]
Times = Annotated[int, Range(1, 10**6)]  # a mistyped number would never end
Warmup = Annotated[int, Range(0, 10**6)]
Odd = Annotated[int, Range(1, step=2)]
Even = Annotated[int, Range(2, step=2)]
QUIET: Mapping[str, str] = types.MappingProxyType(
    {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
)
"""Environment in which threads that have nothing to do sleep; torch reads it when it is imported."""
Seed = Annotated[int, Range(-(2**63), 2**63 - 1)]
Real = Annotated[float, Range()]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Fraction = Annotated[float, Range(0, 1)]
Portion = Annotated[float, Range(0, 1, above=True)]
Chance = Annotated[float, Range(0, 1, below=True)]


class Checked:
    """Base of dataclasses that check their fields against their types when they are made, then what a
    class and its bases demand of several fields, in methods ``check``. Lists become tuples where a
    tuple is asked for, whole numbers become floats, dicts become the configs that they describe.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside of its range or choices.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        plan, further = _plan(type(self))  # type: ignore[arg-type]
        for name, where, check in plan:
            value = getattr(self, name)
            kept = check(value, where)
            if isinstance(kept, Mapping):
                kept = plain(kept)
            if kept is not value:
                object.__setattr__(self, name, kept)
        for check_own in further:
            check_own(self)


@functools.cache
def _plan(cls: type[Any]) -> tuple[list[tuple[str, str, Check]], list[Callable[[Any], None]]]:
    """Name, place and check of every field, and the methods ``check``. A field says in its metadata if
    it has a check of its own, made of its type, or a ``short`` form, a function of a string that stands
    for the value.
    """
    types_ = typing.get_type_hints(cls, include_extras=True)
    plan = []
    for f in dataclasses.fields(cls):
        check = f.metadata.get("checker", checker)(types_[f.name])
        if "short" in f.metadata:
            check = functools.partial(_written_out, f.metadata["short"], check)
        plan.append((f.name, f"{cls.__qualname__}.{f.name}", check))
    own = (base.__dict__.get("check") for base in reversed(cls.__mro__))
    return plan, [check for check in own if check is not None]


def _written_out(short: Callable[[str], Any], check: Check, value: Any, where: str) -> Any:
    """Check what a short form stands for."""
    try:
        value = short(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return check(value, where)


def checker(hint: Any) -> Check:
    """The check of values against a type.

    Args:
        hint: a class, ``int`` or ``float`` with or without a `Range`, a union, a tuple, a list, a
            mapping, a function, a choice (`Literal`), or ``Any``; annotated with a `Check`: that.
    """
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(hint, TypeVar):
        hint = hint.__bound__
        origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is object or hint is None:
        return lambda value, where: value
    if origin is Annotated:
        own: list[Check] = [rule for rule in args[1:] if callable(rule)]
        rules = [rule for rule in args[1:] if isinstance(rule, Range)]
        return own[0] if own else _number(args[0], rules[0]) if rules else checker(args[0])
    if hint is int or hint is float:
        return _number(hint, Range())
    if origin in (Union, types.UnionType):
        return _path(_union(args)) if {get_origin(a) or a for a in args} & _PATHS else _union(args)
    if origin is Literal:
        return _choice(args)
    if origin is tuple:
        return _tuple(args)
    kind = origin or hint
    if kind is Callable or getattr(kind, "_is_protocol", False):
        return _callable
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return _mapping(args)
    if isinstance(kind, type) and args and issubclass(kind, Iterable):
        return _many(kind, args[0])
    return _instance(kind)


_PATHS = {Path, os.PathLike}


def _path(check: Check) -> Check:
    """Strings among what a check accepts name files."""

    def named(value: Any, where: str) -> Any:
        kept = check(value, where)
        if isinstance(kept, (str, os.PathLike)) and "\0" in os.fspath(kept):
            raise ValueError(
                f"{where}: no file has the character NUL in its name, got {shown(kept)}"
            )
        return kept

    return named


def _callable(value: Any, where: str) -> Any:
    if not callable(value):
        raise TypeError(f"{where}: expected a function, got {shown(value)}")
    if isinstance(value, type) and hasattr(value, "forward"):
        raise TypeError(f"{where}: {value.__name__} is a class; give a module that was made of it")
    return value


def _many(kind: type[Any], hint: Any) -> Check:
    """Any number of values of one type; those of an iterator are not looked at."""
    each = checker(hint)

    def check(value: Any, where: str) -> Any:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, kind):
            raise TypeError(f"{where}: expected a list, got {shown(value)}")
        if not isinstance(value, (list, tuple)):
            return value
        kept = [each(one, f"{where}[{i}]") for i, one in enumerate(value)]
        return value if all(a is b for a, b in zip(kept, value, strict=True)) else kept

    return check


def _python(value: Any) -> Any:
    """A scalar of NumPy as the value of Python that it holds."""
    numpy: Any = sys.modules.get("numpy")  # whoever has one has imported it
    return value.item() if numpy is not None and isinstance(value, numpy.generic) else value


def _number(kind: Any, rule: Range) -> Check:
    accepted: Any = int if kind is int else (int, float)

    def check(value: Any, where: str) -> Any:
        value = _python(value)
        if type(value) is int and abs(value) > _LARGEST:
            raise ValueError(f"{where} does not fit into 64 bits, got {shown(value)}")
        if type(value) is kind:
            if value in rule:
                return value
            raise ValueError(f"{where} must {rule}, got {shown(value)}")
        if not isinstance(value, accepted) or isinstance(value, bool):
            raise TypeError(f"{where}: expected {kind.__name__}, got {shown(value)}")
        if value in rule:
            return kind(value)
        raise ValueError(f"{where} must {rule}, got {shown(value)}")

    return check


_LARGEST = 2**64  # of whole numbers


def _union(args: tuple[Any, ...]) -> Check:
    empty = type(None) in args
    options = [option for option in args if option is not type(None)]
    checks = [checker(option) for option in options]

    def check(value: Any, where: str) -> Any:
        if value is None and empty:
            return None
        errors: list[Exception] = []
        try:
            for one in checks:
                try:
                    return one(value, where)
                except (TypeError, ValueError) as error:
                    errors.append(error)
            raise _nearest(errors, value) or TypeError(
                f"{where}: expected {' or '.join(map(_words, options))}, got {shown(value)}"
            )
        finally:
            errors.clear()  # each knows this frame, and all that called it would live on

    return check


def _nearest(errors: list[Exception], value: Any) -> Exception | None:
    """The error of the type that is meant, None if nobody can tell which that is."""
    outside = [e for e in errors if type(e) is ValueError and not isinstance(value, str)]
    alone = outside or len(errors) == 1 or isinstance(value, Mapping)
    return (outside or errors)[0] if alone else None


def _choice(args: tuple[Any, ...]) -> Check:
    kinds = {type(a) for a in args}

    def check(value: Any, where: str) -> Any:
        value = _python(value)
        if type(value) in kinds and value in args:
            return value
        if type(value) not in kinds:
            raise TypeError(f"{where}: expected {_words(Literal[args])}, got {shown(value)}")
        raise unknown("value", str(value), [str(a) for a in args], where=where)

    return check


def _tuple(args: tuple[Any, ...]) -> Check:
    many = args[-1] is Ellipsis
    each = [checker(a) for a in args if a is not Ellipsis]

    def check(value: Any, where: str) -> Any:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise TypeError(f"{where}: expected a list, got {shown(value)}")
        if not many and len(value) != len(each):
            raise ValueError(f"{where}: expected {len(each)} values, got {len(value)}")
        checks = each * len(value) if many else each
        kept = tuple(
            one(v, f"{where}[{i}]") for i, (one, v) in enumerate(zip(checks, value, strict=True))
        )
        same = type(value) is tuple and all(a is b for a, b in zip(kept, value, strict=True))
        return value if same else kept

    return check


def _mapping(args: tuple[Any, ...]) -> Check:
    each = checker(args[1]) if args else checker(Any)

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, Mapping):
            raise TypeError(f"{where}: expected a dict, got {shown(value)}")
        kept = {key: each(one, f"{where}[{key!r}]") for key, one in value.items()}
        return value if all(kept[key] is one for key, one in value.items()) else kept

    return check


def _instance(kind: Any) -> Check:
    read = getattr(kind, "from_dict", None)

    def check(value: Any, where: str) -> Any:
        if isinstance(value, kind):
            return value
        if kind is bool and isinstance(found := _python(value), bool):
            return found
        if read is not None and isinstance(value, Mapping):
            return read(value, where=where)
        inner = "; give what its module() returns" if hasattr(value, "module") else ""
        raise TypeError(f"{where}: expected {_words(kind)}, got {shown(value)}{inner}")

    return check


def held(kind: str, read: Check, *, optional: bool) -> Check:
    """The check of a field that holds the config of a registered part.

    Args:
        kind: registry of the part.
        read: makes such a config of anything else, or refuses.
        optional: None is accepted, too.
    """

    def check(value: Any, where: str) -> Any:
        found = type(value).__dict__.get("ENTRY")
        if (found is not None and found.kind == kind) or (optional and value is None):
            return value
        return read(value, where)

    return check


def _words(hint: Any) -> str:
    """What a type accepts, for people."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _words(get_args(hint)[0])
    if origin is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return "a list"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a dict"
    if hasattr(hint, "from_dict"):
        return f"{hint.__qualname__} or a dict of its options"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):  # how one is written
        fields = dataclasses.fields(hint)
        asked = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
        return f"{hint.__qualname__}({', '.join(asked)})"
    return str(getattr(hint, "__name__", hint))


def plain(value: Any) -> Any:
    """Plain JSON values: configs and mappings as dicts, tuples as lists."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
