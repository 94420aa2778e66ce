"""`effformer profile`: what one forward costs."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import (
    FFN,
    Attn,
    Batch,
    Block,
    Device,
    Dtype,
    Force,
    Json,
    Out,
    Set,
    Threads,
    check_report,
    emit,
    load,
    moved,
    overrides,
    set_threads,
    stages,
)


def profile(
    model: Annotated[str, typer.Argument(help="A model name, or the folder of a saved model.")],
    attn: Attn = None,
    ffn: FFN = None,
    block: Block = None,
    pairs: Set = None,
    batch: Batch = 1,
    cross_check: Annotated[
        bool, typer.Option("--cross-check", help="Compare with fvcore's and torch's counters.")
    ] = False,
    time: Annotated[bool, typer.Option("--latency", help="Measure wall time as well.")] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Count multiply-adds by module and operator, parameters, activation memory.

    With --out report.html (or .json, .txt) the report is also written to a file.

    Examples: `effformer profile dit-xl --attn flow`,
    `effformer profile dit-b --cross-check -o dit-b.html`
    """
    from .. import profile as library

    check_report(out, "profile", force=force)
    set_threads(threads)
    built = moved(load(model, overrides(attn, ffn, block, pairs)), device, dtype)
    inputs = built.example_inputs(batch)
    with stages() as stage:
        cost = library.profile(built, inputs, cross_check=cross_check, progress=stage)
        wall = None
        if time:
            stage("measuring latency")
            wall = library.latency(built, inputs, threads=threads)
        if out is not None:
            cost.save(out, force=force)
    data = cost.to_dict()
    text = str(cost)
    if wall is not None:
        data["latency"] = {
            "median": wall.median,
            "p10": wall.p10,
            "p90": wall.p90,
            "threads": wall.threads,
        }
        text += f"\n{wall}"
    emit(data, text, as_json)
