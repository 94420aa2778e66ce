"""Files of samples: pictures and numbers that appear complete or not at all. Needs numpy alone; this
file also lies in every bundle, beside `effformer.export.run`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import stat
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "MARK",
    "Array",
    "BundleError",
    "check_place",
    "write_file",
    "write_image",
    "write_samples",
]

MARK = b"effformer:samples"  # every file of samples carries it, and no other file is replaced
Array = np.ndarray[Any, np.dtype[Any]]


class BundleError(ValueError):
    """A bundle or a request that cannot be served; the message is one sentence for the user."""


def write_image(
    path: str | Path, pixels: Array, zoom: int | None = None, *, force: bool = False
) -> None:
    """Write pictures (B, H, W, c) uint8, c = 1 or 3, as one grid into a PNG file.

    Args:
        path: the file, see `write_file`.
        pixels: the pictures.
        zoom: every pixel becomes a square of this side; None makes the pictures at least 64 pixels
            wide.
        force: replace any file.

    Raises:
        BundleError: the place cannot be written, or holds something else.
    """
    count, height, width, channels = pixels.shape
    side = zoom or max(1, 64 // width)
    tiles = pixels.repeat(side, axis=1).repeat(side, axis=2)
    height, width = height * side, width * side
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full(
        (rows * (height + 2) + 2, columns * (width + 2) + 2, channels), 255, dtype=np.uint8
    )
    for i, tile in enumerate(tiles):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        grid[top : top + height, left : left + width] = tile
    lines = np.concatenate(
        [np.zeros((len(grid), 1), np.uint8), grid.reshape(len(grid), -1)], axis=1
    )
    kind = 0 if channels == 1 else 2
    header = struct.pack(">IIBBBBB", grid.shape[1], grid.shape[0], 8, kind, 0, 0, 0)
    picture = zlib.compress(lines.tobytes(), 9)
    words = b"Software\0" + MARK
    chunks = ((b"IHDR", header), (b"tEXt", words), (b"IDAT", picture), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
        for tag, data in chunks
    )
    write_file(path, b"\x89PNG\r\n\x1a\n" + body, force=force)


def write_samples(path: str | Path, samples: Array, *, force: bool = False) -> None:
    """Write samples as an .npy file, behind whose numbers `MARK` stands; see `write_file`.

    Raises:
        BundleError: the place cannot be written, or holds something else.
    """
    buffer = io.BytesIO()
    np.save(buffer, samples, allow_pickle=False)
    write_file(path, buffer.getvalue() + MARK, force=force)


def write_file(path: str | Path, data: bytes, *, force: bool = False) -> None:
    """Write a file that appears complete or not at all, for a runner that has no effformer.

    Args:
        path: the place: new, or earlier samples; a link to a regular file is written through.
        data: the content.
        force: replace any regular file.

    Raises:
        BundleError: the place cannot be written, or holds something else.
    """
    target = check_place(path, force=force)
    for left in target.parent.glob(".effformer-*.part"):  # by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    temporary = target.with_name(f".effformer-{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except OSError as error:
        full = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise BundleError(f"{path}: cannot be written ({full}); choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_place(path: str | Path, *, force: bool = False) -> Path:
    """The file that `write_file` writes for a path.

    Raises:
        BundleError: a folder, a device, a link to nowhere or in a circle, or a file of others.
    """
    target, why = Path(os.path.realpath(path)), ""
    try:
        if os.path.islink(path) and not target.exists():
            why = "is a symbolic link to nowhere or in a circle"
        elif target.exists() and not target.is_file():
            why = "is a folder or a device"
        elif not target.parent.is_dir():
            why = "lies in no folder"
        elif target.exists() and not force:
            with target.open("rb") as file:
                ends = file.read(4096)
                file.seek(max(file.tell(), target.stat().st_size - 4096))
                if MARK not in ends + file.read():
                    why = "holds something else than samples; add --force to replace it"
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
    if why:
        raise BundleError(f"{path}: {why}, or choose another place")
    return target
