"""One process at a time in the folder of a run."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import alive, host

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["hold", "release"]

_FAR = 1 << 30  # where a byte is locked on Windows, behind all that others may want to read


def hold(path: Path) -> int:
    """Hold a lock file, in which the owner's process and machine stand, until `release`.

    The system lets go of it when the process ends, however it ends: a file that a killed process
    left is taken over. On file systems without locks the process that it names must be dead.

    Raises:
        ValueError: another process, or another call in this one, holds it.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        owner = _owner(handle)
        if not _taken(handle, owner):
            os.close(handle)
            who = f"process {owner.get('pid', '?')} on {owner.get('machine', '?')}"
            raise ValueError(
                f"train: {path.parent} is in use by {who}, since {owner.get('since', '?')}; wait until "
                "it ends, or choose another folder"
            )
        with suppress(FileNotFoundError):
            # the owner before may have removed the file between opening and locking it
            if os.path.samestat(os.fstat(handle), path.stat()):
                break
        os.close(handle)
    facts = {"pid": os.getpid(), "host": host(), "machine": socket.gethostname()}
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(facts | {"since": since}).encode())
    return handle


def release(handle: int, path: Path, pid: int) -> None:
    """Let go of a lock file; a forked child leaves that of its parent alone."""
    if os.getpid() == pid:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _owner(handle: int) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(os.read(handle, 4096))
        return found if isinstance(found, dict) else {}
    return {}


def _taken(handle: int, owner: dict[str, Any]) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(handle, _FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # no locks here
        pid = owner.get("pid")
        return not (owner.get("host") == host() and isinstance(pid, int) and alive(pid))
    return True
