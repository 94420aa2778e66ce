"""Files appear complete or not at all, and what stood there before stays until then."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checks import FormatError

__all__ = ["atomic_folder", "atomic_path", "check_folder", "read_json", "write_json"]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it on success, remove it on failure.

    Raises:
        FormatError: the place cannot be written, or is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise FormatError(f"{path}: is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent
        )
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path, *, marker: str, own: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder; it replaces ``folder`` on success and vanishes on failure.

    Args:
        folder: the target. It may exist if it is empty or an earlier result of the same kind.
        marker: file that identifies the kind of folder.
        own: globs of the other files of such a result.

    Raises:
        FormatError: the target is a file, holds something else, or cannot be written.
    """
    folder = Path(folder)
    check_folder(folder, marker=marker, own=own)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise FormatError(
            f"{folder}: cannot be written ({error.strerror}); choose another place"
        ) from error
    try:
        yield temporary
        temporary.chmod(0o755)
        old = temporary.with_name(temporary.name + ".old")
        if folder.exists():
            folder.replace(old)
        try:
            temporary.replace(folder)
        except OSError:
            if old.exists():
                old.replace(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: Path, *, marker: str, own: Collection[str] = ()) -> None:
    """Whether `atomic_folder` may replace a folder: nothing that it did not write would be lost.

    Raises:
        FormatError: it may not.
    """
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder}: is a file; choose a folder")
    if not folder.is_dir() or not (found := sorted(f.name for f in folder.iterdir())):
        return
    if marker not in found:
        raise FormatError(
            f"{folder}: holds other files and no {marker}; choose an empty or new folder"
        )
    known = (marker, *own)
    if others := [n for n in found if not any(fnmatch.fnmatch(n, k) for k in known)]:
        raise FormatError(
            f"{folder}: would be replaced, but also holds {', '.join(others[:3])}; move "
            f"{'it' if len(others) == 1 else 'them'} away or choose another folder"
        )


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        FormatError: the file is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except RecursionError as error:
        raise FormatError(f"{path}: is not readable JSON (nested too deeply)") from error
    except (OSError, ValueError) as error:  # not UTF-8, not JSON, or a number without end
        raise FormatError(f"{path}: is not readable JSON ({error})") from error
