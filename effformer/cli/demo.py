"""`effformer demo`: the whole line, from a name to a running edge model, on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, Seed, Threads, emit, set_threads, table

_MARKER = "demo.json"


def demo(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for everything; new, empty or an earlier demo."),
    ] = Path("effformer-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A third of the training: about a minute.")
    ] = False,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train two small flow transformers on digits, then measure, quantize, export and run them.

    One has softmax attention, one Flow-Attention; both are then timed on 1,024 and 4,096 tokens, where
    it matters which. Ends with `report.html` and `summary.json`; exit
    code 1 if fewer than 90 % of the samples are recognised. An interrupted demo goes on where it
    was when the command is run again.

    Examples: `effformer demo`, `effformer demo --quick -o quick`
    """
    from ..files import atomic_path, write_json
    from ..train.recipes import DIGITS, DIGITS_QUICK
    from .demo_report import page, summary
    from .demo_steps import GATE, run_demo

    set_threads(threads)
    _claim(out)
    recipe, per_class = (DIGITS_QUICK, 20) if quick else (DIGITS, 50)
    result = run_demo(out, recipe, seed=seed, per_class=per_class, say=_speaker())
    facts = summary(result) | {"quick": quick}
    write_json(out / "summary.json", facts)
    with atomic_path(out / "report.html") as temporary:
        temporary.write_text(page(result), encoding="utf-8")
    emit(facts, _closing(result, facts, out), as_json)
    if not result.passed:
        low = ", ".join(
            f"{f.label} {f.recognised:.1%}" for f in result.gated if (f.recognised or 0) < GATE
        )
        print(f"effformer: demo: below {GATE:.0%} recognised: {low}", file=sys.stderr)
        raise typer.Exit(1)


def _claim(out: Path) -> None:
    """Make the folder ours; one that holds other things is left alone.

    Raises:
        FormatError: the folder holds other things, or is a file.
        OSError: it cannot be written.
    """
    from ..checks import FormatError
    from ..files import write_json
    from ..version import VERSION

    if out.exists() and not out.is_dir():
        raise FormatError(f"demo: {out} is a file; choose a folder with --out")
    marker = out / _MARKER
    ours = marker.is_file() and '"effformer demo"' in marker.read_text("utf-8", errors="replace")
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise FormatError(
            f"demo: {out} holds other things and no {_MARKER}; choose a new or an empty folder "
            "with --out"
        )
    write_json(out / _MARKER, {"kind": "effformer demo", "effformer": VERSION})


def _speaker() -> Callable[[str], None]:
    """Print finished steps with the time since the start on stderr."""
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {line}", file=sys.stderr, flush=True)

    return say


def _closing(result: Any, facts: dict[str, Any], out: Path) -> Any:
    from rich.console import Group

    from .demo_report import cost_rows

    header, rows = cost_rows(result)
    end = f"{facts['seconds_total']:.0f} s; open {out / 'report.html'}"
    return Group(table(header, rows), *facts["verdict"], end)
