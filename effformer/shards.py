"""Safetensors files tensor by tensor: read when asked for, written one after the other, in one file or in shards
with an index.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import FormatError, reason
from .layout import StateDict
from .lazy import LazyTensor, values

__all__ = ["INDEX", "lazy_file", "shards_of", "write_shards", "write_tensors"]

INDEX = ".index.json"
"""How the name of an index of shards ends."""

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_LONGEST = 100_000_000  # bytes of a header
_PIECE = 1 << 30  # bytes that the system reads at a time
_WRITTEN = 1 << 20  # and writes


class _File:
    """An open file, whose tensors are read one by one; the last one is kept, since layouts cut it into several.
    Should another file take its place meanwhile, it is still the one that was opened.

    Args:
        path: the file.
        last: where the last tensor is kept, of all files that share this.
    """

    def __init__(self, path: Path, last: dict[tuple[Path, int], Tensor]) -> None:
        self.path, self.last = path, last
        self.raw = FileIO(path)
        weakref.finalize(self, self.raw.close)

    def read(self, start: int, like: Tensor) -> Tensor:
        """The tensor of this shape and type that begins at a byte."""
        place = self.path, start
        if place not in self.last:
            self.last.clear()
            self.last[place] = self._read(start, like)
        return self.last[place].view(like.shape)

    def _read(self, start: int, like: Tensor) -> Tensor:
        data = torch.empty(_bytes(like), dtype=torch.uint8)
        self.raw.seek(start)
        into = memoryview(data.numpy())  # type: ignore[arg-type]
        while into:
            if not (done := self.raw.readinto(into[:_PIECE])):
                raise FormatError(f"{self.path}: became shorter while it was read")
            into = into[done:]
        return data.view(like.dtype)

    def header(self) -> tuple[dict[str, Any], int]:
        """The header, and the byte at which the data begin.

        Raises:
            ValueError: it is none.
        """
        size = self.path.stat().st_size
        length = int.from_bytes(self.raw.read(8), "little")
        if not 2 <= length <= min(_LONGEST, size - 8):
            raise ValueError(f"{size} bytes, of which its header would be {length}")
        return json.loads(self.raw.read(length)), 8 + length


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where a tensor stands in a file; called, it is read."""

    file: _File
    start: int
    like: Tensor

    def __call__(self) -> Tensor:
        return self.file.read(self.start, self.like)

    def copied(self, target: FileIO) -> bool:
        """Let the system append the bytes to another file, which takes a fraction of the time; False if it
        cannot.
        """
        done, count = 0, _bytes(self.like)
        while done < count:
            try:
                made = os.copy_file_range(
                    self.file.raw.fileno(), target.fileno(), count - done, self.start + done
                )
            except (AttributeError, OSError):  # other systems, and between some file systems
                made = 0
            if not made:
                target.seek(-done, os.SEEK_CUR)
                return False
            done += made
        return True


def lazy_file(
    path: Path, last: dict[tuple[Path, int], Tensor] | None = None
) -> tuple[StateDict, dict[str, str]]:
    """The tensors of a safetensors file, whose values are read on demand, and its metadata.

    Args:
        path: the file.
        last: a dict that it shares with other shards, so that one tensor of all is kept.

    Raises:
        FormatError: the file is missing, truncated, or none.
    """
    try:
        file = _File(path, {} if last is None else last)
        header, begin = file.header()
        about, end = dict(header.pop("__metadata__", {})), 0
        found: StateDict = {}
        for name, entry in header.items():
            like, (first, stop) = _like(name, entry), entry["data_offsets"]
            whole = type(first) is type(stop) is int
            if not whole or first < 0 or stop - first != _bytes(like):
                raise ValueError(f"{name} has {stop - first} bytes")
            found[name] = LazyTensor(like, _Place(file, begin + first, like))
            end = max(end, stop)
        if begin + end != (size := path.stat().st_size):
            raise ValueError(f"{size:,} bytes instead of {begin + end:,}")
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FormatError(
            f"{path}: is truncated or not a safetensors file ({reason(error)})"
        ) from error
    return found, about


def _like(name: str, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"{name} is {entry['dtype']}, which torch has no type for")
    return torch.empty(entry["shape"], dtype=_TYPES[entry["dtype"]], device="meta")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file tensor by tensor; of lazy ones one at a time is in memory.

    Raises:
        ValueError: a tensor of a type that such files have not.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, x in tensors.items():
        if x.dtype not in _NAMES:
            raise ValueError(f"cannot be saved: {name} is {x.dtype}")
        start, end = end, end + _bytes(x)
        header[name] = {
            "dtype": _NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with FileIO(path, "wb") as file:
        _write(file, len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            if isinstance(x, LazyTensor) and isinstance(x.make, _Place) and x.make.copied(file):
                continue
            flat = values(x).detach().contiguous().reshape(-1)
            _write(file, flat.view(torch.uint8).numpy())


def _write(file: FileIO, data: Any) -> None:
    """All of it, in pieces that stay in the processor's cache."""
    left = memoryview(data)
    while left:
        left = left[file.write(left[:_WRITTEN]) :]


def shards_of(tensors: Mapping[str, Tensor], limit: int) -> list[StateDict]:
    """Tensors in their order, in as few shards as hold ``limit`` bytes each; a larger tensor stands alone."""
    shards: list[StateDict] = []
    room = 0
    for name, x in tensors.items():
        size = _bytes(x)
        if not shards or size > room:
            shards.append({})
            room = limit
        shards[-1][name] = x
        room -= size
    return shards


def write_shards(
    index: Path, names: list[str], shards: list[StateDict], metadata: Mapping[str, str]
) -> None:
    """Write shards beside each other, and the index that names them.

    Args:
        index: the index.
        names: names of the files of the shards.
        shards: their tensors.
        metadata: what each of them, and the index, says beside.
    """
    places: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        write_tensors(index.with_name(name), shard, metadata)
        places |= dict.fromkeys(shard, name)
    total = sum(_bytes(x) for shard in shards for x in shard.values())
    facts = {"metadata": {"total_size": total, **metadata}, "weight_map": places}
    index.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _bytes(x: Tensor) -> int:
    return math.prod(x.shape) * x.element_size()
