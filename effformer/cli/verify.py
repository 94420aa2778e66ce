"""`effformer verify`: an ONNX file against its model, or a bundle against its record."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import FFN, Attn, Block, Json, Set, Threads, emit, load, overrides, stages, table


def verify(
    exported: Annotated[Path, typer.Argument(help="An ONNX file, or the folder of a bundle.")],
    model: Annotated[
        str | None, typer.Argument(help="For ONNX files: the saved model (or name) it came from.")
    ] = None,
    cases: Annotated[int, typer.Option(help="Number of other shapes.", min=1, max=1000)] = 3,
    tolerance: Annotated[float, typer.Option(help="Largest relative difference.")] = 1e-4,
    attn: Attn = None,
    ffn: FFN = None,
    block: Block = None,
    pairs: Set = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare an export with what it should compute; exit code 1 if it differs.

    Examples: `effformer verify digits.onnx runs/digits/model`, `effformer verify bundle`
    """
    from ..export import VerificationError, open_bundle, verify_onnx
    from ..export.run import Bundle

    if exported.is_dir():
        bundle = open_bundle(exported, threads)
        error = bundle.self_test()
        data: dict[str, Any] = {
            "path": str(exported),
            "passed": True,
            "max_rel": error,
            "kind": bundle.KIND,
            "form": bundle.form if isinstance(bundle, Bundle) else None,
        }
        text = f"{exported}: agrees with its record within {error:.1e}"
        if isinstance(bundle, Bundle) and bundle.choice is not None:
            data["choice"] = asdict(bundle.choice)
            text += f"\nruns as {bundle.choice}"
        emit(data, text, as_json)
        return
    if model is None:
        raise ValueError(f"verify: what should {exported} compute? Name the model or its folder")
    network = load(model, overrides(attn, ffn, block, pairs))
    failure = None
    try:
        with stages() as stage:
            stage("comparing")
            report = verify_onnx(
                exported, network, cases=cases, tolerance=tolerance, threads=threads
            )
    except VerificationError as error:
        if error.report is None:
            raise
        report, failure = error.report, error
    rows = [
        (
            ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in case.shapes.items()),
            o.name,
            f"{o.max_rel:.1e}",
        )
        for case in report.cases
        for o in case.outputs
    ]
    emit(report.to_dict(), table(("inputs", "output", "difference"), rows), as_json)
    if failure is not None:
        print(f"effformer: {failure}", file=sys.stderr)
        raise typer.Exit(1)
