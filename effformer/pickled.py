"""Torch files as data: training checkpoints keep command lines, numbers of numpy and paths beside
their weights. Each of these is read into a plain stand-in of ours; no class of the file is made.
"""

from __future__ import annotations

import pickle
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from .checks import FormatError, reason

__all__ = ["read_pickled"]

_LOCK = threading.Lock()  # torch keeps one list of allowed names for the process
_NUMBER = re.compile(r"[iuf]\d|b1|c\d+")


def read_pickled(path: Path) -> Any:
    """The content of a torch file, read with ``weights_only=True``; namespaces become dicts, numbers
    of numpy Python numbers, paths strings.

    Raises:
        FormatError: truncated, not a torch file, holds other objects than data, or would unpack to
            gigabytes.
    """
    _check_unpacked(path)
    try:
        with warnings.catch_warnings(), _LOCK, torch.serialization.safe_globals(_ALLOWED):
            warnings.simplefilter("ignore", UserWarning)  # other pickle protocols: read or refused
            found = torch.load(path, map_location="cpu", weights_only=True)
        return _plain(found)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = "" if named is None else f" ({named[1]})"
        raise FormatError(
            f"{path}: holds pickled objects other than tensors{what}, or is no checkpoint; effformer reads "
            "data, not code: save a plain state dict or safetensors"
        ) from error
    except Exception as error:  # the reader meets rubbish with whatever its next step raises
        raise FormatError(
            f"{path}: is truncated or not a torch checkpoint ({reason(error)})"
        ) from error


def _check_unpacked(path: Path) -> None:
    """Refuse an archive that announces more than it holds: torch does not compress.

    Raises:
        FormatError: it unpacks to gigabytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # an older form, or none, which the reader will say
    if unpacked > max(2**30, 2 * path.stat().st_size):
        raise FormatError(
            f"{path}: would unpack from {path.stat().st_size:,} to {unpacked:,} bytes, which no "
            "checkpoint of torch does; save it again with torch.save"
        )


class _Namespace:
    """Stands for a namespace: its attributes, as they are in the file."""


class _Type:
    """Stands for a type of numpy: its code, such as "f8"."""

    def __init__(self, code: object, *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


class _Array:
    """Stands for an array of numpy, such as the state of a generator; its content is passed over."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _number(kind: object, data: object = None) -> Any:
    """A number of numpy as one of Python, None for what is no number."""
    code = kind.code if isinstance(kind, _Type) else None
    if not isinstance(code, str) or not isinstance(data, bytes) or not _NUMBER.fullmatch(code):
        return None
    return np.frombuffer(data, np.dtype(f"{kind.order}{code}"), count=1)[0].item()  # type: ignore[attr-defined]


def _path(*names: object) -> str:
    return str(PurePosixPath(*map(str, names)))


_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")
_PATHS = [
    f"{module}.{kind}Path"
    for module in ("pathlib", "pathlib._local")
    for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")
    if kind or module == "pathlib"
]
_ALLOWED: list[Any] = [
    (_Namespace, "argparse.Namespace"),
    (_Namespace, "types.SimpleNamespace"),
    (dict, "lightning_fabric.utilities.data.AttributeDict"),
    (dict, "lightning.fabric.utilities.data.AttributeDict"),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (_Type, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_number, f"{module}.scalar") for module in _ARRAYS),
    *((_Array, f"{module}._reconstruct") for module in _ARRAYS),
    *((_path, name) for name in _PATHS),
]
"""(stand-in, name in the file): what may stand beside the weights."""


def _plain(value: Any) -> Any:
    """The same without stand-ins."""
    if isinstance(value, _Namespace):
        return _plain(vars(value))
    if isinstance(value, (_Type, _Array)):
        return None
    if isinstance(value, Mapping):
        plain = OrderedDict((key, _plain(inner)) for key, inner in value.items())
        if hasattr(value, "_metadata"):
            plain._metadata = value._metadata  # type: ignore[attr-defined]  # of a state dict
        return plain
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
