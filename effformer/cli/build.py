"""`effformer build`: a model from parts, checked and optionally saved."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from .common import (
    FFN,
    Attn,
    Averaged,
    Block,
    Force,
    Json,
    Keep,
    Out,
    Seed,
    Set,
    Strict,
    emit,
    load,
    loaded,
    overrides,
)  # fmt: skip


def build(
    name: Annotated[str, typer.Argument(help="A model name; effformer list models.")],
    attn: Attn = None,
    ffn: FFN = None,
    block: Block = None,
    pairs: Set = None,
    weights: Annotated[
        str | None, typer.Option(help="Load a safetensors or torch file of any known layout.")
    ] = None,
    strict: Strict = "yes",
    use: Averaged = "auto",
    keep: Keep = None,
    seed: Seed = 0,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Build a model from parts; save it as a folder with --out.

    Examples: `effformer build dit-b --attn flow --set depth=6`,
    `effformer build sit-xl --weights SiT-XL-2-256.pt -o sit-xl`
    """
    model = load(name, overrides(attn, ffn, block, pairs), seed=seed)

    from ..io import load_weights, save_pretrained
    from ..profile import count_parameters

    report = None
    if weights is not None:
        report = load_weights(model, weights, strict=strict == "yes", weights=use, keep=keep or ())
    folder = None if out is None else str(save_pretrained(model, out, by="build", force=force))
    data = {
        "name": model.name,
        "parameters": count_parameters(model),
        "config": model.config.to_dict(),
        "layout": report and report.layout,
        "loaded": report and asdict(report),
        "saved": folder,
    }
    lines = [
        f"{model.name}: {data['parameters']:,} parameters",
        json.dumps(data["config"], indent=2),
    ]
    if report is not None:
        lines.append(f"weights: {weights} ({loaded(report)})")
    lines.append(f"saved in {folder}" if folder else "not saved; add --out FOLDER")
    emit(data, "\n".join(lines), as_json)
