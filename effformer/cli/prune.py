"""`effformer prune`: a smaller model from a saved one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .common import Force, Json, Out, Set, emit, load, overrides, save_to
from .compress import named_tensors
from .report import Report, check_place, write_report

if TYPE_CHECKING:
    from effformer.models.base import Model
    from effformer.train import Objective

__all__ = ["objective_of", "prune"]

_Share = Annotated[float | None, typer.Option(help="Largest share of them that is left.")]


def prune(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model.", show_default=False)],
    scheme: Annotated[
        str,
        typer.Option(
            help="How units are compared: magnitude; on --data: activation, taylor, gradient, sides."
        ),
    ] = "magnitude",
    macs: _Share = None,
    params: _Share = None,
    keep: Annotated[float | None, typer.Option(help="Share of the units that stays.")] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(help="What may go: heads, channels, experts, blocks, width. May be repeated."),
    ] = None,
    scope: Annotated[
        Literal["uniform", "global"], typer.Option(help="The same share of every part, or of all.")
    ] = "uniform",
    where: Annotated[
        list[str] | None, typer.Option(help="Glob of module paths to cut, such as 'blocks.*.ffn'.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Labelled images to measure on: digits, mnist:DIR, ..., or a .safetensors file with x "
            "and y."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="How many of them.", min=1, max=10**6)] = 512,
    pairs: Set = None,
    report: Report = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Take out of a saved model what matters least; prints what went, and what is saved by it.

    Other options go into --set: `--set round_to=16`, `--set recover=least-squares`.

    Examples: `effformer prune model --macs 0.5 -o model-half`
    """
    from ..compress import prune as run
    from ..files import check_folder
    from ..io import model_folder, save_pretrained

    target = save_to(out, "prune")
    if os.path.realpath(target) == os.path.realpath(model):
        raise ValueError(
            f"prune: --out {target} is the model itself, whose weights would be lost; choose another "
            "folder"
        )
    check_folder(target, **model_folder("trained", by="prune", force=force))
    check_place(report, force=force)
    if macs is params is keep is None:
        macs = 0.5
    whole = load(str(model))
    given = {"macs": macs, "params": params, "keep": keep, "units": units}
    chosen = {name: value for name, value in given.items() if value is not None}
    measured = {} if data is None else _measured(whole, data, samples)
    small, found = run(
        whole, {"importance": scheme, "scope": scope, **chosen, **overrides(pairs=pairs)},
        where or "*", **measured,
    )  # fmt: skip
    save_pretrained(small, target, by="prune", force=force)
    said = [str(found), f"saved in {target}", *write_report(report, whole, small, force=force)]
    emit(found.to_dict() | {"saved": str(target)}, "\n".join(said), as_json)


def _measured(model: Model, source: str, samples: int) -> dict[str, Any]:
    """Batches of a data set, and the loss that the model was trained with."""
    return {"data": named_tensors(source, samples, "prune"), "objective": objective_of(model)}


def objective_of(model: Model) -> Objective:
    """The loss that a model of images is trained with: its convention says whether it generates them."""
    from ..train import Classification, Generation

    return Classification() if type(model).CONVENTION is None else Generation()
