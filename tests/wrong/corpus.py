"""Wrong values for every argument of a function, made of its annotations and of values that are right."""

from __future__ import annotations

import inspect
import math
import re
import signal
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn

from effformer.checks import is_refusal

__all__ = ["Bad", "Entry", "fault", "trials"]

SECONDS = 30
"""Longest time that one wrong call may take."""

MOST_WORDS = 700
"""Longest message, in characters."""


@dataclass(frozen=True)
class Entry:
    """A public function, and arguments that are right.

    Attributes:
        name: as users call it.
        call: the function.
        good: makes arguments by name, in a folder of their own, anew for every trial.
        skip: arguments that take anything.
        method: what is called with the folder and the arguments, instead of the function itself.
    """

    name: str
    call: Callable[..., Any]
    good: Callable[[Path], dict[str, Any]]
    skip: tuple[str, ...] = ()
    method: Callable[..., Any] | None = None

    def answer(self, folder: Path, **changes: Any) -> Any:
        """Call it, with some arguments changed."""
        given = self.good(folder) | changes
        return self.call(**given) if self.method is None else self.method(folder, **given)


@dataclass(frozen=True)
class Bad:
    """One value that is wrong, or may be.

    Attributes:
        words: what it is.
        value: the value.
        wrong: no answer can be right.
    """

    words: str
    value: Any
    wrong: bool


class Strange(nn.Module):
    """A module that returns what nobody expects."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.answer = answer
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(args[0] if args else None)


ANYTHING: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "an object": object,
    "words": lambda: "nonsense",
    "bytes": lambda: b"x",
    "a number": lambda: 3.5,
    "a whole number": lambda: 7,
    "a list of objects": lambda: [object()],
    "a dict of objects": lambda: {"nonsense": object()},
    "a class": lambda: nn.Linear,
    "an empty list": list,
    "an empty dict": dict,
}
NUMBERS = {
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "-1": -1, "0": 0, "-2.5": -2.5, "1.5": 1.5,
    "huge": 10**15, "beyond float": 10**400, "True": True, "a numpy float": np.float32(-1),
}  # fmt: skip
WORDS = {
    "empty": "",
    "unknown": "no-such-name",
    "with a nul": "a\0b",
    "with a line": "a\nb",
    "long": "x" * 300,
}


def tensors(x: Tensor) -> Iterator[tuple[str, Any]]:
    """What x might be mistaken for."""
    yield "no samples", x[:0] if x.dim() else x.new_empty(0)
    yield "further axis", x[None]
    yield "scalar", x.new_zeros(())
    yield "fewer axes", x[0] if x.dim() and len(x) else x
    yield "last axis empty", x[..., :0] if x.dim() else x
    yield "last axis longer", torch.cat([x, x[..., :1]], -1) if x.dim() else x
    yield "one sample more", torch.cat([x, x[:1]]) if x.dim() else x
    yield "meta", x.to("meta")
    yield "numpy", x.detach().numpy()
    yield "list", x.detach().tolist()
    for kind in (torch.float64, torch.float16, torch.int64, torch.complex64, torch.bool):
        if kind != x.dtype:
            yield str(kind), x.to(kind)
    if x.is_floating_point():
        yield "nan", x * math.nan
        yield "inf", x + math.inf
    if x.dtype == torch.int64:
        yield "negative", x - 10**6
        yield "large", x + 10**6
    yield "sparse", x.to_sparse() if x.dim() else x


def modules() -> Iterator[tuple[str, Any]]:
    yield "returns a dict", Strange(lambda x: {"out": x})
    yield "returns None", Strange(lambda x: None)
    yield "returns words", Strange(lambda x: "words")
    yield "returns a tuple", Strange(lambda x: (x, x))
    yield "returns nan", Strange(lambda x: x * math.nan)
    yield "on meta", Strange(lambda x: x).to("meta")
    yield "without weights", nn.Identity()
    yield "empty", nn.Sequential()
    yield "of complex weights", Strange(lambda x: x).to(torch.complex64)


def functions() -> Iterator[tuple[str, Any]]:
    yield "takes nothing", lambda: None
    yield "returns None", lambda *a, **k: None
    yield "returns words", lambda *a, **k: "words"


def paths(folder: Path) -> Iterator[tuple[str, Any]]:
    empty, text, link = folder / "empty", folder / "text", folder / "link"
    empty.write_bytes(b"")
    text.write_text("hello")
    (folder / "folder").mkdir()
    link.symlink_to(folder / "nowhere")
    (folder / "binary").write_bytes(bytes(range(256)) * 9)
    (folder / "deep.json").write_bytes(b"[" * 100_000)
    (folder / "list.json").write_text("[1, 2]")
    yield "missing", folder / "none" / "none"
    yield "a folder", folder / "folder"
    yield "an empty file", empty
    yield "a text", text
    yield "bytes of all kinds", folder / "binary"
    yield "deep JSON", folder / "deep.json"
    yield "a list", folder / "list.json"
    yield "below a file", text / "below"
    yield "a broken link", link
    yield "a device", Path("/dev/null")
    yield "in /proc", Path("/proc/x")
    yield "empty words", ""
    yield "a nul", "a\0b"
    yield "a long name", str(folder / ("x" * 300))


def allowed(value: Any, hint: Any) -> bool:
    """Whether a value may be meant by an annotation; ranges are not looked at."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is object or isinstance(hint, typing.TypeVar):
        return (
            not isinstance(hint, typing.TypeVar)
            or hint.__bound__ is None
            or allowed(value, hint.__bound__)
        )
    if origin is Annotated:
        return allowed(value, args[0])
    if origin in (typing.Union, types.UnionType):
        return any(allowed(value, a) for a in args)
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if origin is tuple and args[-1:] != (...,):
        return isinstance(value, (list, tuple)) and len(value) == len(args)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    if kind in (Callable, Callable) or getattr(kind, "_is_protocol", False):
        return callable(value)
    if not isinstance(kind, type):
        return True
    if isinstance(value, Mapping) and hasattr(kind, "from_dict"):
        return True
    if not isinstance(value, kind):
        return issubclass(kind, Sequence) and not issubclass(kind, str) and isinstance(value, list)
    if issubclass(kind, Mapping) and args:
        return all(allowed(v, args[1]) for v in value.values())
    if isinstance(value, (list, tuple)) and args:
        return all(allowed(v, args[0]) for v in value)
    return not (isinstance(value, str) and kind is not str and args)


def number(good: Any, hint: Any) -> bool:
    """Whether a number is meant."""
    if good is None:
        return hint is not Any and hint is not object and allowed(2, hint)
    return isinstance(good, (int, float)) and not isinstance(good, bool)


def values(good: Any, hint: Any, folder: Path) -> Iterator[Bad]:
    """Wrong values beside a right one."""
    for words, make in ANYTHING.items():
        value = make()
        yield Bad(words, value, not allowed(value, hint))
    if number(good, hint):
        for words, value in NUMBERS.items():
            yield Bad(words, value, words in ("nan", "inf", "-inf"))
    if isinstance(good, Tensor):
        for words, value in tensors(good):
            if words == "sparse" and hint is Any:
                continue
            yield Bad(words, value, not allowed(value, hint))
    if isinstance(good, nn.Module):
        for words, value in modules():
            yield Bad(words, value, False)
    elif callable(good):
        for words, value in functions():
            yield Bad(words, value, False)
    if isinstance(good, Path):
        for words, value in paths(folder):
            yield Bad(words, value, False)
    if isinstance(good, str):
        for words, value in WORDS.items():
            yield Bad(words, value, False)
    if isinstance(good, torch.Generator):
        yield Bad("numpy's generator", np.random.default_rng(0), True)
    if isinstance(good, (tuple, list)) and good:
        yield from (
            Bad(f"{words} inside", [value, *good[1:]], wrong)
            for words, value, wrong in inner(good[0], hint, folder)
        )
        yield Bad("one more", [*good, good[-1]], False)
        yield Bad("one less", list(good[:-1]), False)
    if isinstance(good, Mapping) and good:
        first = next(iter(good))
        yield from (
            Bad(f"{words} in {first!r}", {**good, first: value}, wrong)
            for words, value, wrong in inner(good[first], hint, folder)
        )
        yield Bad("a further key", {**good, "nonsense": good[first]}, False)
        yield Bad("a key less", {k: v for k, v in good.items() if k != first}, False)


def inner(good: Any, hint: Any, folder: Path) -> Iterator[tuple[str, Any, bool]]:
    args = get_args(hint)
    each = Any if not args else args[-1] if args[-1] is not ... else args[0]
    for bad in values(good, each, folder):
        yield bad.words, bad.value, False


def hints(call: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the arguments, as far as they can be read."""
    call = inspect.unwrap(call)
    of = call if inspect.isroutine(call) else (call if inspect.isclass(call) else type(call))
    names = annotations(of) if inspect.isclass(of) else {}
    if not inspect.isroutine(of):
        of = of.__init__ if inspect.isclass(call) else of.__call__
    return names | annotations(inspect.unwrap(of))


def annotations(of: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(of, include_extras=True)
    except (NameError, TypeError):  # a name that only type checkers see: the others are read
        names, out = getattr(of, "__globals__", {}), {}
        for name, words in inspect.get_annotations(of).items():
            with suppress(NameError, TypeError):
                out[name] = eval(words, names)
        return out


def trials(entry: Entry, folder: Path) -> Iterator[tuple[str, str, Callable[[], Any], bool]]:
    """(argument, what it is given, the call, whether no answer can be right)."""
    own = hints(entry.call)
    made = 0

    def fresh() -> Path:
        nonlocal made
        made += 1
        place = folder / str(made)
        place.mkdir(parents=True)
        return place

    for name, good in entry.good(fresh()).items():
        if name in entry.skip:
            continue
        for bad in values(good, own.get(name, Any), fresh()):

            def call(name: str = name, value: Any = bad.value) -> Any:
                return entry.answer(fresh(), **{name: value})

            yield name, bad.words, call, bad.wrong


class Slow(BaseException):
    """A call did not end."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


SIGNATURE = re.compile(
    r"missing \d+ required|unexpected keyword|positional argument|multiple values for"
)


def fault(call: Callable[[], Any], wrong: bool) -> str | None:
    """What is wrong with the answer to a wrong call, None if nothing is."""
    try:
        with limited(SECONDS):
            answer = call()
    except Slow:
        return f"did not end in {SECONDS} s"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        said = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            return None
        if "allocate" in said or isinstance(error, MemoryError):
            return None
        if not is_refusal(error) and not (type(error) is TypeError and SIGNATURE.search(said)):
            return f"{type(error).__name__}: {said[:300]!r}"
        if not said.strip() or len(said) > MOST_WORDS:
            return f"a message of {len(said)} characters: {said[:200]!r}"
        return None
    return f"answered {str(answer)[:80]!r}" if wrong else None
