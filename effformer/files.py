"""The one writer: what it writes appears complete or not at all, what stood there before stays until
then, and only what this program wrote itself is replaced.

Everything is made in a temporary folder beside its place, forced to the disk, and moved in one step.
A place that is a symbolic link is written through.
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from .arguments import checked
from .checks import FormatError, reason

__all__ = [
    "DiskError", "alive", "atomic_folder", "atomic_path", "check_file", "check_folder", "disk_errors", "host",
    "inside", "mark", "read_json", "read_whole", "sweep", "workspace", "write_json",
]  # fmt: skip

T = TypeVar("T")

_EDGE = 16_384  # bytes at either end of a file in which its mark stands
_TRIES = 1000  # how often a folder that others exchange is looked at again
_AGE = 7 * 86_400  # seconds after which nobody writes to a temporary folder any more
_TEMPORARY = re.compile(r"\.effformer-([0-9a-f]{8})-(\d{1,9})-[0-9a-f]{8}")
_FULL = re.compile(r"No space left|quota exceeded|\d+ requested and \d+ written", re.IGNORECASE)
FORCE = "choose another place, or replace it with --force (force=True in Python)"


class DiskError(FormatError, OSError):
    """A place cannot be written: the disk is full or broken, or the system forbids it."""


CARD, README = "model card", "README.md"
"""The kind of a file that tells of a model, and its name in the folder of one."""


def mark(kind: str) -> str:
    """What a file of a kind carries near its beginning or its end, so that `check_file` knows it."""
    return f"effformer:{kind}"


def check_file(path: str | Path, *kinds: str, force: bool = False) -> Path:
    """The regular file that a path stands for, if `atomic_path` may replace it.

    Args:
        path: the place; a link to a regular file stands for that file.
        *kinds: what is worth no more than what will be written. A file that is there must carry the
            `mark` of one of them; none: any file, for places that the caller knows to be its own.
        force: any regular file may be replaced.

    Raises:
        FormatError: a folder, a device, a link to nowhere or in a circle, a protected file, or one
            that this program did not write as one of ``kinds``.
    """
    path = Path(path)
    try:
        target = _resolved(path)
        mode = target.stat().st_mode if target.exists() else None
        if mode is None:
            _check_above(target)
            return target
        if stat.S_ISDIR(mode):
            raise FormatError(f"{path}: is a folder; give the name of a file")
        if not stat.S_ISREG(mode):
            raise FormatError(
                f"{path}: is a device, pipe or socket, no regular file; choose another"
            )
        if force:
            return target
        if not stat.S_IMODE(mode) & 0o222:
            raise FormatError(f"{path}: is write-protected; {FORCE}")
        if kinds and not _carries(target, kinds):
            raise FormatError(
                f"{path}: holds something that effformer did not write as {' or '.join(kinds)}; {FORCE}"
            )
    except OSError as error:
        raise _unwritable(path, error) from error
    return target


@checked
@contextmanager
def atomic_path(path: str | Path, *kinds: str, force: bool = False) -> Iterator[Path]:
    """Yield a temporary file; on success it takes the place of ``path``, on failure it vanishes.

    Further files that are left beside it move with it, before it; their names must be new.

    Args:
        path: the place, see `check_file`. A new file gets the permissions that the user's umask
            leaves, an existing one keeps its own.
        *kinds: what may be replaced, see `check_file`.
        force: replace whatever regular file is there.

    Raises:
        FormatError: the place cannot be written, or holds something that must stay.
        DiskError: the disk is full.
    """
    path = Path(path)
    target = check_file(path, *kinds, force=force)
    with workspace(path) as space:
        temporary = space / target.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if check_file(path, *kinds, force=force).exists():
            mode = target.stat().st_mode
        further = [f for f in sorted(space.iterdir()) if f != temporary]
        try:
            for file in (*further, temporary):
                file.chmod(stat.S_IMODE(mode))
                _sync(file)
                os.replace(file, target.with_name(file.name))
        finally:
            if temporary.exists():  # an interruption may fall between a move and any note of it
                for file in (f for f in further if not f.exists()):
                    target.with_name(file.name).unlink(missing_ok=True)
        _sync(target.parent)


def check_folder(
    folder: Path,
    *,
    marker: str,
    own: Collection[str] = (),
    objection: Callable[[Path], str] | None = None,
    force: bool = False,
) -> Path:
    """The folder that a path stands for, if `atomic_folder` may replace it: nothing that this program
    did not write would be lost.

    Raises:
        FormatError: it may not.
    """
    folder = Path(folder)
    look = functools.partial(_replaceable, folder, marker, own, objection, force)
    return read_whole(folder, look)  # another process may exchange it meanwhile


def _replaceable(
    folder: Path,
    marker: str,
    own: Collection[str],
    objection: Callable[[Path], str] | None,
    force: bool,
) -> Path:
    try:
        target = _resolved(folder)
        if target.exists() and not target.is_dir():
            raise FormatError(f"{folder}: is a file; choose a folder")
        _check_above(target)
        found = sorted(target.iterdir()) if target.is_dir() else []
    except OSError as error:
        raise _unwritable(folder, error) from error
    if not found:
        return target
    if marker not in (f.name for f in found):
        raise FormatError(
            f"{folder}: holds other files and no {marker}; choose an empty or new folder"
        )
    if others := [f.name for f in found if not _own(f, (marker, *own))]:
        raise FormatError(
            f"{folder}: would be replaced, but also holds {', '.join(others[:3])}; move "
            f"{'it' if len(others) == 1 else 'them'} away or choose another folder"
        )
    if not force and objection is not None and (words := objection(target)):
        raise FormatError(f"{folder}: {words}; {FORCE}")
    return target


@checked
@contextmanager
def atomic_folder(
    folder: str | Path,
    *,
    marker: str,
    own: Collection[str] = (),
    objection: Callable[[Path], str] | None = None,
    force: bool = False,
) -> Iterator[Path]:
    """Yield a temporary folder; it replaces ``folder`` on success and vanishes on failure.

    Whoever looks in between, and whoever writes at the same time, finds one result or the other,
    whole; see `read_whole`.

    Args:
        folder: the target. It may exist if it is empty or an earlier result of the same kind.
        marker: file that identifies the kind of folder.
        own: globs of the other files of such a result.
        objection: says why an earlier result must stay, "" if it need not.
        force: replace it all the same; files that are not of such a result are never removed.

    Raises:
        FormatError: the target is a file, holds something else, or cannot be written.
        DiskError: the disk is full.
    """
    folder = Path(folder)
    check = functools.partial(
        check_folder, folder, marker=marker, own=own, objection=objection, force=force
    )
    target = check()
    with workspace(folder) as space:
        temporary = space / target.name
        temporary.mkdir()
        yield temporary
        mode = stat.S_IMODE(temporary.stat().st_mode)
        for file in temporary.rglob("*"):
            file.chmod(mode if file.is_dir() else mode & 0o666)
            _sync(file)
        _sync(temporary)
        check()
        _put(temporary, target)
        _sync(target.parent)


@contextmanager
def workspace(place: str | Path) -> Iterator[Path]:
    """A temporary folder beside a place; those of killed processes are removed on the way.

    Raises:
        DiskError: it cannot be made, or the disk is full.
    """
    place, target = Path(place), Path(os.path.realpath(place))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        space = target.with_name(f".effformer-{host()}-{os.getpid()}-{secrets.token_hex(4)}")
        space.mkdir()
    except OSError as error:
        raise _unwritable(place, error) from error
    try:
        with disk_errors(place):
            yield space
    finally:
        _discard(space)


def sweep(folder: Path) -> None:
    """Remove from a folder the temporary folders of processes that were killed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name)
            if found is None or not entry.is_dir(follow_symlinks=False):
                continue
            with suppress(OSError):
                killed = found[1] == host() and not alive(int(found[2]))
                if killed or time.time() - entry.stat().st_mtime > _AGE:
                    _discard(Path(entry.path))


def read_whole(folder: Path, read: Callable[[], T]) -> T:
    """What ``read`` gives for a folder that is not exchanged for another while it reads."""
    for _ in range(_TRIES):
        before = _identity(folder)
        try:
            result = read()
        except (OSError, ValueError):
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return result
    raise FormatError(f"{folder}: is replaced all the time; read it when nobody writes")


def inside(folder: Path, name: str) -> Path | None:
    """The file that a foreign file names, relative to the folder in which it lies; None if it lies
    elsewhere, symbolic links included.
    """
    if "\0" in name or Path(name).is_absolute():
        return None
    path = folder / name
    real, own = (Path(os.path.realpath(p)) for p in (path, folder))  # resolve() fails on loops
    return path if real.is_relative_to(own) else None


@checked
def write_json(path: str | Path, data: Any) -> None:
    """Write JSON atomically.

    Raises:
        TypeError: the data are no JSON values.
        FormatError: the file cannot be written.
    """
    try:
        text = json.dumps(data, indent=2)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"write_json: {path}: the data are no JSON values ({error})") from error
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


@checked
def check_finite(path: str | Path) -> None:
    """Refuse what has no end, or answers never, before it is read.

    Raises:
        FormatError: a device, pipe or socket.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # whoever reads it says why that cannot be
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise FormatError(f"{path}: is a device, pipe or socket; choose a file")


@checked
def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        FormatError: the file is missing, no regular one, or not JSON.
    """
    path = Path(path)
    check_finite(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except RecursionError as error:
        raise FormatError(f"{path}: is not readable JSON (nested too deeply)") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: is not readable JSON ({reason(error)})") from error


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say in words that a disk is full or broken, whatever the writer inside calls it.

    Raises:
        DiskError: it is.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(error)):
            raise DiskError(
                f"{path}: the disk is full ({reason(error)}); what was there before is intact, free some "
                "space or choose another place"
            ) from error
        if number in (errno.EFBIG, errno.EIO, errno.EROFS):
            raise _unwritable(path, error) from error
        raise


def alive(pid: int) -> bool:
    """Whether a process of this machine lives; True where the system cannot be asked."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@functools.cache
def host() -> str:
    """This machine, and in it this space of process numbers, in eight digits."""
    with suppress(OSError):
        return _short(socket.gethostname() + os.readlink("/proc/self/ns/pid"))
    return _short(socket.gethostname())


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _resolved(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise FormatError(
            f"{path}: is a symbolic link that leads in a circle; choose another place"
        )
    if path.is_symlink() and not target.exists():
        raise FormatError(
            f"{path}: is a symbolic link to {target}, which does not exist; choose another place"
        )
    return target


def _own(path: Path, names: Collection[str]) -> bool:
    """Whether an entry of a folder is what its kind puts there, or our card of it: no link, no other
    folder.
    """
    if path.name == README and path.is_file() and not path.is_symlink():
        return _carries(path, (CARD,))
    if path.is_symlink() or not any(fnmatch.fnmatch(path.name, name) for name in names):
        return False
    return path.name == "__pycache__" if path.is_dir() else path.is_file()


def _carries(path: Path, kinds: Collection[str]) -> bool:
    with path.open("rb") as file:
        ends = file.read(_EDGE)
        file.seek(max(len(ends), path.stat().st_size - _EDGE))
        ends += file.read(_EDGE)
    return any(mark(kind).encode() in ends for kind in kinds)


def _check_above(target: Path) -> None:
    """Refuse places below a file before what will stand there is made.

    Raises:
        NotADirectoryError: no folder can hold the place.
    """
    if not next((path for path in target.parents if path.exists()), target).is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def _unwritable(path: Path, error: Exception) -> DiskError:
    why = getattr(error, "strerror", None) or str(error)
    return DiskError(f"{path}: cannot be written ({why}); choose another place")


def _discard(space: Path) -> None:
    """Remove a temporary folder. What `_put` moved out of its place, in which nothing came to stand
    since, goes back.
    """
    for old in space.glob(f"{space.name}-*"):
        place = space.with_name(old.name.removeprefix(f"{space.name}-"))
        with suppress(OSError):
            if not place.exists():
                os.rename(old, place)
    shutil.rmtree(space, ignore_errors=True)


def _put(new: Path, folder: Path) -> None:
    """Put a folder into its place; what stood there comes to stand beside the new one's old place.

    Another process may do the same at any time, so every step may find its place taken or empty.
    """
    old = new.with_name(f"{new.parent.name}-{folder.name}")
    for _ in range(_TRIES):
        if _exchange(new, folder):
            return
        try:
            os.rename(new, folder)  # a place that is free, or an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not folder.is_dir():
                raise
        # a file system that cannot exchange: for a moment the place is empty
        with suppress(FileNotFoundError):
            os.rename(folder, old)
        try:
            os.rename(new, folder)
            return
        except OSError:
            if old.exists() and not folder.exists():
                raise
            shutil.rmtree(old, ignore_errors=True)  # the other process was quicker
    raise FormatError(f"{folder}: others write here all the time; choose another place")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False if one is missing or the system cannot do it."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, 2) == 0)
        return bool(library.renameat2(-100, names[0], -100, names[1], 2) == 0)
    except (AttributeError, OSError, TypeError):
        return False


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _sync(path: Path) -> None:
    """Force a file or folder to the disk before it is relied upon."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # a system whose folders cannot be opened
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)
