"""`effformer build`: a model from parts, checked and optionally saved."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .common import FFN, Attn, Block, Force, Json, Out, Seed, Set, emit, load, overrides


def build(
    name: Annotated[str, typer.Argument(help="A model name; effformer list models.")],
    attn: Attn = None,
    ffn: FFN = None,
    block: Block = None,
    pairs: Set = None,
    weights: Annotated[
        str | None, typer.Option(help="Load a safetensors or torch file of any known layout.")
    ] = None,
    seed: Seed = 0,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Build a model from parts; save it as a folder with --out.

    Examples: `effformer build dit-b --attn flow --set depth=6`,
    `effformer build sit-xl --weights SiT-XL-2-256.pt -o sit-xl`
    """
    from ..io import load_weights, save_pretrained

    model = load(name, overrides(attn, ffn, block, pairs), seed=seed)
    report = None if weights is None else load_weights(model, weights)
    folder = None if out is None else str(save_pretrained(model, out, by="build", force=force))
    data = {
        "name": model.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "config": model.config.to_dict(),
        "layout": report and report.layout,
        "saved": folder,
    }
    lines = [
        f"{model.name}: {data['parameters']:,} parameters",
        json.dumps(data["config"], indent=2),
    ]
    if report is not None:
        lines.append(f"weights: {weights} ({report.layout} layout)")
    lines.append(f"saved in {folder}" if folder else "not saved; add --out FOLDER")
    emit(data, "\n".join(lines), as_json)
