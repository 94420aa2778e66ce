"""Commands that are killed or interrupted at a chosen moment.

One process imports everything once and forks a victim for every call, so that a hundred kills do not
cost a hundred imports. What a victim does to the watched folder is counted in steps: opening,
moving, removing a file. A moment is a step, which SIGKILL hits before and SIGINT right after it, or
a time.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["INTERRUPT", "KILL", "Fate", "Moment", "Victims"]

KILL, INTERRUPT = int(signal.SIGKILL), int(signal.SIGINT)
_STEPS = frozenset(
    {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}
)
_LOADED = (
    "effformer.build", "effformer.cli.main", "effformer.compress", "effformer.export.bundle", "effformer.models",
    "effformer.profile.html", "effformer.train", "networkx", "onnxruntime", "onnxscript.optimizer", "pydantic",
    "onnxruntime.quantization.matmul_nbits_quantizer", "torch._dynamo", "torch.onnx", "rich.console",
    "torch.onnx._internal.exporter._core",
)  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """When a signal arrives: at a step, counted from 0, or after seconds."""

    signal: int
    step: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Fate:
    """How a victim ended: exit code or minus the signal, time, steps, and what it printed."""

    status: int
    seconds: float
    steps: int
    said: str


class Victims:
    """Calls of the command line in processes of their own.

    Args:
        log: a file for what they print, in a folder that holds their temporary files, too.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(log.parent)},
        )
        self._answer()

    def close(self) -> None:
        """End the process that forks them."""
        self._server.communicate()

    def temporary(self) -> list[Path]:
        """What effformer left where the system wants temporary files."""
        return list(self._log.parent.glob("*effformer*"))

    def call(
        self,
        words: Sequence[str],
        watched: Path,
        moment: Moment | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Fate:
        """One call.

        Args:
            words: of the command line.
            watched: the folder whose steps count.
            moment: when it is hit, if at all.
            settings: values that it gives to names of modules before.
        """
        job = {
            "words": list(words), "watched": str(watched), "log": str(self._log), "settings": settings or {},
            "moment": None if moment is None else vars(moment),
        }  # fmt: skip
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        status, seconds, steps = self._answer()
        return Fate(status, seconds, steps, self._log.read_text(errors="replace"))

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, f"the process that forks ended with {self._server.wait()}"
        return json.loads(line)


def _serve() -> None:
    for name in _LOADED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    print("null", flush=True)
    for line in sys.stdin:
        print(json.dumps(_fate(json.loads(line))), flush=True)


def _fate(job: dict[str, Any]) -> tuple[int, float, int]:
    moment = Moment(**job["moment"]) if job["moment"] else None
    counter, began = mmap.mmap(-1, 8), time.monotonic()  # shared with the child
    pid = os.fork()
    if pid == 0:
        _suffer(job, moment, counter)
    pending = moment if moment is not None and moment.seconds is not None else None
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if pending is not None and time.monotonic() - began > (pending.seconds or 0):
            os.kill(pid, pending.signal)
            pending = None
        time.sleep(0.0005)
    status = os.waitstatus_to_exitcode(done[1])
    return status, time.monotonic() - began, int.from_bytes(counter[:8], "little")


def _suffer(job: dict[str, Any], moment: Moment | None, counter: mmap.mmap) -> None:
    """What a victim does, from the fork to its end."""
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for path, value in job["settings"].items():
            module, name = path.rsplit(".", 1)
            setattr(sys.modules[module], name, value)
        from effformer.cli.main import main

        sys.argv = ["effformer", *job["words"]]
        sys.addaudithook(_watch(job["watched"], moment, counter))
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watch(
    watched: str, moment: Moment | None, counter: mmap.mmap
) -> Callable[[str, tuple[Any, ...]], None]:
    """A hook that counts steps and hits at one of them."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        exchanges = event == "ctypes.dlsym" and args[1] in ("renameat2", "renamex_np")
        if not exchanges and not (event in _STEPS and _concerns(args, watched)):
            return
        hit = moment is not None and moment.step == count
        count += 1
        counter[:8] = count.to_bytes(8, "little")
        if hit and moment is not None:
            if moment.signal == INTERRUPT:
                sys.setprofile(_interrupted(hook))
            else:
                os.kill(os.getpid(), moment.signal)

    return hook


def _interrupted(hook: Callable[..., None]) -> Callable[[FrameType, str, Any], None]:
    """A profiler that interrupts what follows a step, as soon as the step is done."""

    def profiler(frame: FrameType, event: str, arg: Any) -> None:
        if frame.f_code not in (hook.__code__, profiler.__code__):
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)

    return profiler


def _concerns(args: tuple[Any, ...], watched: str) -> bool:
    """Whether a step is in the watched folder; those relative to an open folder are of `rmtree`."""
    paths = [os.fsdecode(a) for a in args if isinstance(a, str | bytes | os.PathLike)]
    beside = isinstance(args[-1], int) and args[-1] >= 0 and not any(map(os.path.isabs, paths))
    return beside or any(path.startswith(watched) for path in paths)


if __name__ == "__main__":
    _serve()
