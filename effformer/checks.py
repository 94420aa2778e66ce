"""Errors that say what to do next, and the checks that raise them."""

from __future__ import annotations

import difflib
import dis
import importlib
import itertools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "CapabilityError",
    "FormatError",
    "MissingExtra",
    "RunError",
    "check_batch",
    "check_device",
    "check_ids",
    "check_mask",
    "check_shape",
    "check_state",
    "check_values",
    "is_refusal",
    "need",
    "reason",
    "shown",
    "speaks",
    "suggest",
    "unknown",
]


class CapabilityError(ValueError):
    """A part was asked for something that it cannot do; the message names parts that can."""


class FormatError(ValueError):
    """A file or folder is not what it should be: truncated, foreign, newer than this version, or
    half-written.
    """


class RunError(ValueError, RuntimeError):
    """A model, or its graph, fails on what it was given; the message names that, and what its runtime
    said.
    """


class MissingExtra(ImportError):
    """An optional package is not installed; the message carries the install command."""


_SPEAKERS = {__package__}
"""Import packages whose ``raise`` statements tell users something."""


def speaks(package: str) -> None:
    """Take what a plug-in's import package raises for refusals, as `is_refusal` does with ours."""
    _SPEAKERS.add(package)


def is_refusal(error: BaseException) -> bool:
    """True for what was raised to tell a user something: the classes of this file, and a ValueError,
    TypeError or OSError that a ``raise`` statement of this library, or of a plug-in, made. What Python, torch or ONNX Runtime
    raise inside is a fault of ours, whatever its class.
    """
    if isinstance(error, (CapabilityError, FormatError, MissingExtra)):
        return True
    if not isinstance(error, (ValueError, TypeError, OSError)):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code, name = trace.tb_frame.f_code, str(trace.tb_frame.f_globals.get("__name__"))
    raised = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and name.partition(".")[0] in _SPEAKERS


def need(module: str, extra: str | None = None) -> ModuleType:
    """Import an optional package where it is used.

    Args:
        module: dotted name of the module, for instance ``"onnxruntime"``.
        extra: the extra of effformer that installs it; None means the package belongs to the
            default install.

    Raises:
        MissingExtra: the package cannot be imported. The message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        target = f"effformer[{extra}]" if extra else "effformer"
        raise MissingExtra(
            f"{module!r} cannot be imported ({error}); pip install '{target}'"
        ) from error


def reason(error: Exception) -> str:
    """What the system or a reader says of a file, without Python's numbers and repetitions."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest of ``choices``, or an empty string."""
    near = difflib.get_close_matches(name.lower(), list(choices), n=1, cutoff=0.55)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: Any) -> str:
    """A value in a message, cut where it is long; of things without a text of one line, the class."""
    kind, value = type(value), _beginning(value)
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"a {kind.__name__} of many digits"
    if "\n" in text or kind.__dict__.get("__repr__", object.__repr__) == object.__repr__:
        return kind.__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def _beginning(value: object) -> object:
    """What a message can show of a long list or dict: state dicts hold a thousand tensors, whose texts take
    seconds.
    """
    if isinstance(value, dict):
        return value if len(value) <= 40 else dict(itertools.islice(value.items(), 40))
    return value[:40] if type(value) in (list, tuple) else value  # type: ignore[index]


def unknown(
    what: str, name: str, choices: Sequence[str], *, where: str = "", hint: str = ""
) -> ValueError:
    """Build the error for a name that is not among ``choices`` (suggestion, then the choices or how
    to list them).
    """
    listed = hint or "choices: " + ", ".join(choices)
    prefix = f"{where}: " if where else ""
    near = suggest(name[:80], choices)
    return ValueError(f"{prefix}unknown {what} {shown(name)}{near} ({listed})")


def check_shape(x: Tensor, expected: str, sizes: Sequence[int | None], *, where: str) -> None:
    """Check a tensor against ``sizes`` (None accepts any length).

    Args:
        x: the tensor.
        expected: the shape in words, for instance ``"(B, 4, 32, 32)"``.
        sizes: one entry per dimension.
        where: the public entry point that was called.

    Raises:
        TypeError: ``x`` is not a dense tensor.
        ValueError: the number of dimensions or a length differs.
    """
    import torch  # here, so that the command line can print its help without torch

    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{where}: expected a tensor {expected}, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{where}: expected a dense tensor {expected}, got {x.layout}")
    fits = x.dim() == len(sizes) and all(
        want is None or have == want for have, want in zip(x.shape, sizes, strict=True)
    )
    if not fits:
        letters = expected.partition(")")[0].lstrip("(").removesuffix(",").split(", ")
        known = [
            f"{letter} is {want}"
            for letter, have, want in zip(letters, x.shape, sizes, strict=False)
            if want not in (None, have) and letter != str(want)
        ]
        said = f": {', '.join(known)}" if known and len(letters) == len(sizes) == x.dim() else ""
        raise ValueError(f"{where}: expected shape {expected}, got {tuple(x.shape)}{said}")


def check_batch(batch: Any, *, where: str) -> None:
    """Refuse what is no number of samples; one that a graph leaves open is one.

    Raises:
        TypeError: no whole number.
        ValueError: less than 1.
    """
    from torch import SymInt

    if isinstance(batch, SymInt):
        return
    if not isinstance(batch, int) or isinstance(batch, bool):
        raise TypeError(f"{where}: expected a number of samples, got {batch!r}")
    if batch < 1:
        raise ValueError(f"{where}: the number of samples must be at least 1, got {batch}")


def check_device(device: Any, *, where: str) -> torch.device | None:
    """A device by its name; None stays None.

    Raises:
        ValueError: torch knows no such device.
    """
    import torch

    try:
        return None if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"{where}: unknown device {shown(device)}; choices: cpu, cuda, cuda:0, ..."
        ) from error


def check_state(state: Any, kind: type, batch: int, *, where: str) -> None:
    """Refuse a state of something else, or of other samples.

    Args:
        state: what was given; its tensors have the samples in front.
        kind: what ``init_state`` returns.
        batch: number of samples of the tokens.
        where: the public entry point that was called.

    Raises:
        TypeError: a state of another kind.
        ValueError: one of another number of samples.
    """
    from torch import Tensor, compiler
    from torch.utils._pytree import tree_leaves

    if not isinstance(state, kind):
        raise TypeError(
            f"{where}: expected {kind.__name__} from init_state or the step before, "
            f"got {type(state).__name__}"
        )
    if compiler.is_compiling():
        return
    for x in tree_leaves(state):
        if isinstance(x, Tensor) and x.dim() and x.shape[0] != batch:
            raise ValueError(f"{where}: a state of {x.shape[0]} samples, but tokens of {batch}")


def check_values(x: Tensor, *, where: str) -> None:
    """Refuse a tensor without values, where these count.

    Raises:
        ValueError: it is on the meta device.
    """
    if x.is_meta:
        raise ValueError(f"{where} is on the meta device, which holds no values")


def check_mask(mask: Any, *, where: str) -> None:
    """Refuse a mask whose values may mean anything: 1 and 0, or 0 and -inf.

    Args:
        mask: True = may attend, a real token.
        where: the public entry point that was called, and the name of the argument.

    Raises:
        TypeError: it is not bool.
    """
    import torch

    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{where}: expected a tensor of bool, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{where}: expected bool, True = may attend, got {mask.dtype}; mask.bool() where 1 and 0 "
            "are meant, mask > -1 where 0 and -inf are"
        )


def check_ids(ids: Tensor, below: int, *, where: str) -> None:
    """Check ids of rows of a table.

    They are read on the CPU only, and not while a graph is captured: elsewhere looking at them
    would make every call wait for the device.

    Args:
        ids: whole numbers of any shape.
        below: number of rows.
        where: the public entry point that was called, and the name of the argument.

    Raises:
        TypeError: the ids are no whole numbers.
        ValueError: an id lies outside 0..below - 1.
    """
    import torch

    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{where} must be int64 ids, got {ids.dtype}")
    plain = type(ids) is torch.Tensor and ids.device.type == "cpu" and ids.numel()
    if torch.compiler.is_compiling() or not plain:
        return
    low, high = ids.aminmax()
    if low < 0 or high >= below:
        raise ValueError(f"{where} must lie in 0..{below - 1}, got {int(low if low < 0 else high)}")
