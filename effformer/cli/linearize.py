"""`effformer linearize`: a saved model with linear attention in place of softmax."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Batch,
    Force,
    Json,
    Out,
    Seed,
    Set,
    Threads,
    emit,
    load,
    overrides,
    save_to,
    set_threads,
)
from .compress import named_tensors
from .prune import objective_of
from .report import Report, check_place, write_report

__all__ = ["left", "linearize"]


def linearize(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            help="What it learns from: digits, mnist:DIR, ..., or a .safetensors file of named tensors.",
            show_default=False,
        ),
    ],
    attn: Annotated[
        str, typer.Option(help="The new token mixer: effformer list attention.", metavar="NAME")
    ] = "flow",
    where: Annotated[
        list[str] | None, typer.Option(help="Glob of module paths to replace, such as 'blocks.0'.")
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Steps in which each mixer follows the old one.", min=1, max=10**9)
    ] = 300,
    whole: Annotated[
        int, typer.Option(help="Steps of the whole model after that.", min=0, max=10**9)
    ] = 300,
    batch: Batch = 64,
    samples: Annotated[int, typer.Option(help="Most samples to use.", min=1, max=10**9)] = 10**6,
    run: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints: the same command goes on from there."),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    pairs: Set = None,
    report: Report = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Replace softmax attention in a trained model and let the new one follow the old.

    Options of the mixer and of the training go into --set: `--set attn.eps=1e-5`, `--set lr=1e-3`.

    Examples: `effformer linearize runs/digits/model --attn flow --data digits -o digits-flow`
    """
    from ..compress import linearize as run_it
    from ..files import check_folder
    from ..io import model_folder, save_pretrained

    target = save_to(out, "linearize")
    if os.path.realpath(target) == os.path.realpath(model):
        raise ValueError(
            f"linearize: --out {target} is the model itself, whose weights would be lost; choose "
            "another folder"
        )
    check_folder(target, **model_folder("trained", by="linearize", force=force))
    check_place(report, force=force)
    set_threads(threads)
    old = load(str(model))
    scheme: dict[str, Any] = {"steps": steps, "whole": whole, "batch": batch, "seed": seed}
    tensors = named_tensors(data, samples, "linearize")
    new, found = run_it(
        old, {**scheme, **overrides(attn=attn, pairs=pairs)}, where or "*", data=tensors,
        objective=objective_of(old) if "y" in tensors else None, out=run,
    )  # fmt: skip
    save_pretrained(new, target, by="linearize", force=force)
    said = [str(found), f"saved in {target}", *write_report(report, old, new, force=force)]
    said.append(f"next: effformer bench {model} {target}")
    emit(found.to_dict() | {"saved": str(target)}, "\n".join(said), as_json)


def left(run: Path | None = None, **_: Any) -> str:
    """What an interrupted call leaves."""
    if run is None:
        return "--out holds what it held before; with --run DIR, such a call can go on"
    return f"--out holds what it held before; the same command goes on from {run}"
