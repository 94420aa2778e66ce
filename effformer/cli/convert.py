"""`effformer convert`: weights from one published key layout to another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    shard: Annotated[
        float | None,
        typer.Option(help="Largest size of a file in GB; writes shards and their index.", min=1e-9),
    ] = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert weights between effformer's and published layouts (official, diffusers, timm).

    `effformer show NAME` names the layouts of a model. Foreign files are read as data, not as code. Files of
    safetensors, alone or in shards with an index, may be larger than the memory: a tensor is read and written at
    a time.

    Examples: `effformer convert SiT-XL-2-256.pt -m sit-xl --use ema --to official -o sit.safetensors`,
    `effformer convert sd3/diffusion_pytorch_model.safetensors.index.json -m sd3-medium --to official
    --shard 2 -o sd3.safetensors.index.json`
    """
    from ..convert import convert_weights
    from ..files import check_file
    from ..io import WEIGHTS, save_weights
    from ..weights import open_weights

    size = None if shard is None else max(1, round(shard * 1e9))

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
        built = _empty(model, overrides(pairs=pairs), strict=strict == "yes")
        report = convert_weights(
            built, weights, place, target, source_layout=source, strict=strict == "yes", weights=use,
            shard=size, force=force,
        )  # fmt: skip
        layout, built.trained = report.layout, open_weights(place, lazy=True).trained
        if report.differs or report.missing or report.weights:
            note(f"convert: {weights}: {loaded(report)}")
    if weights.is_dir() and size is None:
        save_weights(built, place, layout=target, force=force)
    elif weights.is_dir():
        convert_weights(built, built.state_dict(), place, target, shard=size, force=force)
    if target != "effformer":
        _note_convention(built, target)
    data = {"model": built.name, "from": layout, "to": target, "saved": str(place)}
    emit(data, f"{built.name}: {layout} -> {target}, saved in {place}", as_json)


def _empty(name: str, changes: dict[str, Any], *, strict: bool) -> Model:
    """A model by name without values, unless some of them may be needed."""
    import torch

    with torch.device("meta"):
        model = load(name, changes)
    starts = any(getattr(module, "neutral_start", False) for module in model.modules())
    return load(name, changes) if starts or not strict else model


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
