"""`effformer sensitivity`: which layers of a saved model bear which format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Force, Json, Out, emit, load, named
from .compress import Data, Samples, Skip, Where, calibration


def sensitivity(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model.", show_default=False)],
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            help="A format to try: effformer list quantizers; with options int8:block=32. May be repeated; "
            "default: int8 and int4.",
            metavar="NAME[:KEY=VALUE,...]",
        ),
    ] = None,
    where: Where = None,
    skip: Skip = None,
    data: Data = None,
    samples: Samples = 64,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Also choose formats for bits=, bytes=, error= or latency=, for instance bits=5.",
            metavar="GOAL=NUMBER",
        ),
    ] = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Round one layer at a time, in every format, and measure what that does to the output of the model.

    Prints a table; --out writes it as .html with a plot, .json or .txt.

    Examples: `effformer sensitivity runs/digits/model --data sampler -o layers.html`,
    `effformer sensitivity model --scheme int8 --scheme nf4 --budget bytes=0.2`
    """
    from ..compress import sensitivity as run
    from ..compress.sensitivity.result import SENSITIVITY
    from ..files import check_file

    if out is not None:
        check_file(out, SENSITIVITY, force=force)
    goal = None if budget is None else _goal(budget)
    dense = load(str(model))
    found = run(
        dense, [named(text) for text in scheme or ("int8", "int4")], where or "*", skip=skip or (),
        data=None if data is None else calibration(dense, data, samples, "sensitivity"),
    )  # fmt: skip
    answer, text = found.to_dict(), str(found)
    if goal is not None:
        chosen = found.budget(**goal)
        expected = found.expected(chosen)
        answer["budget"] = {**chosen.to_dict(), "expected": str(expected)}
        lines = [
            f"{path}: {'dense' if spec is None else spec['name']}"
            for path, spec in chosen.schemes.items()
        ]
        text = "\n".join([text, "", *lines, str(expected)])
    if out is not None:
        found.save(out, force=force)
        answer["saved"] = str(out)
        text += f"\nsaved in {out}"
    emit(answer, text, as_json)


def _goal(text: str) -> dict[str, Any]:
    """The argument of `Sensitivity.budget` that is written "bits=5"."""
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if name not in ("bits", "bytes", "error", "latency") or not 0 < number < float("inf"):
        raise ValueError(
            f"sensitivity: --budget {text!r}: expected bits=, bytes=, error= or latency= and a positive "
            "number, for instance bits=5"
        )
    return {name: number}
