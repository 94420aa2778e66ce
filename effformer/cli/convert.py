"""`effformer convert`: weights from one published key layout to another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import (
    Averaged,
    Force,
    Json,
    Out,
    Set,
    Strict,
    emit,
    load,
    loaded,
    note,
    overrides,
    save_to,
)

if TYPE_CHECKING:
    from effformer.models.base import Model


def convert(
    weights: Annotated[
        Path, typer.Argument(help="A safetensors or torch file, or the folder of a saved model.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model that the weights belong to.")
    ] = None,
    source: Annotated[
        str, typer.Option("--from", help="Layout of the file; auto recognises it.")
    ] = "auto",
    target: Annotated[str, typer.Option("--to", help="Layout to write.")] = "effformer",
    strict: Strict = "yes",
    use: Averaged = "auto",
    pairs: Set = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert weights between effformer's and published layouts (official, diffusers, timm).

    `effformer show NAME` names the layouts of a model. Foreign files are read as data, not as code.

    Examples: `effformer convert SiT-XL-2-256.pt -m sit-xl --use ema --to official -o sit.safetensors`
    """
    from ..files import check_file
    from ..io import WEIGHTS, load_weights, save_weights

    place = save_to(out, "convert")
    if weights.is_dir():
        if model is not None or source not in ("auto", "effformer"):
            raise ValueError(
                f"convert: {weights} is a saved model, which says what it is; leave --model and "
                "--from out"
            )
        if os.path.dirname(os.path.realpath(place)) == os.path.realpath(weights):
            raise ValueError(f"convert: {place} lies inside {weights}; choose another place")
        check_file(place, *WEIGHTS, force=force)
        built, layout = load(str(weights), overrides(pairs=pairs)), "effformer"
    elif model is None:
        raise ValueError("convert: a file does not say what model it belongs to; add --model NAME")
    else:
        check_file(place, *WEIGHTS, force=force)
        built = load(model, overrides(pairs=pairs))
        report = load_weights(built, weights, source, strict=strict == "yes", weights=use)
        layout = report.layout
        if report.differs or report.missing or report.weights:
            note(f"convert: {weights}: {loaded(report)}")
    save_weights(built, place, layout=target, force=force)
    if target != "effformer":
        _note_convention(built, target)
    data = {"model": built.name, "from": layout, "to": target, "saved": str(place)}
    emit(data, f"{built.name}: {layout} -> {target}, saved in {place}", as_json)


def _note_convention(model: Model, target: str) -> None:
    """Say so where readers of a published layout would take the weights for something else."""
    from ..flow import Trained, trained_of

    published, record = model.assumed(), trained_of(model)
    if published is None or record is None:
        return
    expected = Trained.from_dict(published).convention
    if record.convention != expected:
        note(
            f"convert: the weights predict {record.convention}; who reads the {target} layout takes "
            f"them for {expected}"
        )
