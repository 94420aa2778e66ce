"""What all bundles have in common: a folder that is checked before anything in it is opened, graphs in sessions, and
errors as one sentence. Needs numpy and onnxruntime alone; this file also lies in every bundle, beside its runner.
"""

from __future__ import annotations

import argparse
import io
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from . import facts as checks
    from .choice import open_session
    from .pictures import Array, BundleError
else:  # in a bundle, whose runner has made its folder known
    import facts as checks
    from choice import open_session
    from pictures import Array, BundleError

__all__ = ["Opened", "command_line", "kind_of", "refusal", "served"]

RUNNERS = {"pictures": "run", "texts": "texts", "streams": "streams"}
"""Kinds of bundles, and the module of this package that runs one."""


class Opened:
    """An opened folder; a base of what runs a kind of bundles.

    Args:
        folder: the folder.
        threads: threads of ONNX Runtime, None: as the bundle says.
        alone: see `run.Bundle`.

    Attributes:
        facts: the content of ``bundle.json``.

    Raises:
        BundleError: no bundle, one of another kind, an incomplete or damaged one, or one of a newer
            format; a number of threads outside 1..1024.
    """

    KIND = ""

    def __init__(
        self, folder: str | Path, threads: int | None = None, *, alone: bool = False
    ) -> None:
        given = {} if threads is None else {"threads": checks.number(threads, 1, 1024, "threads")}
        self.folder, self._alone = Path(folder), alone
        self.facts = checks.read_facts(self.folder)
        if (kind := kind_of(self.facts)) != self.KIND:
            say = f"{self.folder}: is a bundle of {kind}, not of {self.KIND}"
            raise BundleError(f"{say}; run its own run.py, or effformer.export.{RUNNERS[kind]}")
        self._check(f"{self.folder / 'bundle.json'}: ")
        for name, record in self.facts["files"].items():
            checks.check_file(self.folder, name, record)
        self._options: dict[str, Any] = (self.facts.get("session") or {}) | given

    def _check(self, at: str) -> None:
        """Refuse facts that cannot be used."""
        checks.check_files(self.facts, at)
        checks.check_session(self.facts, at)

    def self_test(self) -> float:
        """See the kinds of bundles."""
        raise BundleError(f"{self.folder}: has no record to compare with")

    def example(self) -> object:
        """One run that a user waits for: a sample, an embedding, a step."""
        return self.self_test()

    def which(self) -> str:
        """Which form runs, and why."""
        return "the bundle has one form"

    def _open(self, name: str, inputs: list[str], form: dict[str, Any] | None = None) -> Any:
        narrow = (form or {}).get("narrow", False)
        path = self.folder / name
        session = open_session(path, self._options, narrow=narrow, alone=self._alone)
        if (found := sorted(i.name for i in session.get_inputs())) != sorted(inputs):
            raise BundleError(f"{path}: takes {found}, expected {sorted(inputs)}")
        return session

    def _run(self, session: Any, feed: dict[str, Array], count: int = 1) -> list[Array]:
        """The first outputs of a graph."""
        names = [output.name for output in session.get_outputs()][:count]
        try:
            out = session.run(names, feed)
        except Exception as error:
            why = refusal(error) or f"onnxruntime cannot run it ({error})"
            raise BundleError(f"{self.folder}: {why}") from error
        if len(out) < count or not all(
            isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in out
        ):
            raise BundleError(f"{self.folder}: the graph gives no tensor of real numbers")
        return list(out)

    def _differs(self, actual: Array, expected: Array, allowed: float, what: str) -> float:
        if actual.shape != expected.shape:
            raise BundleError(f"{self.folder}: the graph gives {actual.shape} for {expected.shape}")
        error = float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-12))
        if not error <= allowed:
            raise BundleError(
                f"{self.folder}: this machine's {what} differs by {error:.1e} from the recorded "
                f"one (allowed {allowed:.0e})"
            )
        return error


def kind_of(facts: dict[str, Any]) -> str:
    """What a bundle makes.

    Raises:
        BundleError: nothing that is known.
    """
    kind = facts.get("kind", "pictures")
    if not isinstance(kind, str) or kind not in RUNNERS:
        raise BundleError(
            f"unknown kind of bundle {reprlib.repr(kind)}; choices: {', '.join(RUNNERS)}"
        )
    return kind


def refusal(error: Exception) -> str:
    """What a graph itself says when it refuses (`effformer.export.guards`), or nothing."""
    found = re.search(r"Name:'refused: ([^']+?)( #[0-9]+)?(_quant)?'", str(error))
    return found[1] if found else ""


def command_line(does: str, recorded: str) -> argparse.ArgumentParser:
    """What the command line of every runner takes: the folder, threads, the comparison with the record."""
    here = Path(__file__).resolve().parent
    inside = (here / "bundle.json").is_file()
    parser = argparse.ArgumentParser(description=f"{does} (numpy and onnxruntime only).")
    add = parser.add_argument
    add("folder", nargs="?" if inside else None, default=here, type=Path, help="the bundle")
    add("--threads", type=int, help="threads of onnxruntime")
    add("--self-test", action="store_true", help=f"compare with the recorded {recorded} and stop")
    add("--force", action="store_true", help="replace whatever file is at --out")
    return parser


def served(serve: Callable[[], Sequence[object]]) -> int:
    """Print what a runner says, or why it refuses, and give the exit code of its process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack characters of a path
            stream.reconfigure(errors="backslashreplace")
    try:
        said = serve()
    except BundleError as error:
        words = " ".join(str(error).split())
        words = words if len(words) < 1200 else f"{words[:500]} ... {words[-500:]}"
        print(f"error: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    for line in said:
        print(line)
    return 0
