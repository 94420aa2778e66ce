"""`effformer compress`: quantize a saved model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .common import Force, Json, Out, Set, emit, load, overrides, save_to


def compress(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model.", show_default=False)],
    scheme: Annotated[str, typer.Option(help="effformer list quantizers.")] = "int8",
    where: Annotated[
        list[str] | None,
        typer.Option(help="Glob of module paths to pack, for instance 'blocks.*.ffn'."),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Glob of layers that stay as they are.")
    ] = None,
    backend: Annotated[str, typer.Option(help="torch, bitsandbytes or auto.")] = "torch",
    pairs: Set = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize the weights of a saved model; prints errors and sizes per layer.

    Options of the scheme go into --set: `--scheme int8 --set block=32`.

    Examples: `effformer compress model --scheme nf4 -o model-nf4`
    """
    from ..compress import quantize
    from ..files import check_folder
    from ..io import model_folder, save_pretrained

    target = save_to(out, "compress")
    if os.path.realpath(target) == os.path.realpath(model):
        raise ValueError(
            f"compress: --out {target} is the model itself, whose dense weights would be lost; "
            "choose another folder"
        )
    check_folder(target, **model_folder("compressed", by="compress", force=force))
    dense = load(str(model))
    small, report = quantize(
        dense, {"name": scheme, **overrides(pairs=pairs)}, where or "*", skip=skip or (),
        backend=backend, inputs=dense.example_inputs(),
    )  # fmt: skip
    save_pretrained(small, target, by="compress", force=force)
    emit(report.to_dict() | {"saved": str(target)}, f"{report}\nsaved in {target}", as_json)
