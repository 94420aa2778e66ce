"""`effformer compress`: quantize a saved model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Force, Json, Out, Set, emit, load, overrides, save_to

if TYPE_CHECKING:
    from torch import Tensor

    from effformer.models.base import Model

__all__ = ["Data", "Samples", "Skip", "Where", "calibration", "compress", "named_tensors"]

Where = Annotated[
    list[str] | None,
    typer.Option(help="Glob of module paths, for instance 'blocks.*.ffn'. May be repeated."),
]
Skip = Annotated[list[str] | None, typer.Option(help="Glob of layers that stay as they are.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Calibration data, which schemes such as gptq need: a .safetensors file of named tensors, a "
        "data set as of train, or 'sampler': what the model sees while it draws its classes."
    ),
]
Samples = Annotated[
    int, typer.Option(help="Samples of the data set to use, or to draw.", min=1, max=10**6)
]


def compress(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model.", show_default=False)],
    scheme: Annotated[str, typer.Option(help="effformer list quantizers.")] = "int8",
    where: Where = None,
    skip: Skip = None,
    backend: Annotated[str, typer.Option(help="torch, bitsandbytes or auto.")] = "torch",
    data: Data = None,
    samples: Samples = 64,
    pairs: Set = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize the weights of a saved model; prints errors and sizes per layer.

    Options of the scheme go into --set: `--scheme int8 --set block=32`.

    Examples: `effformer compress model --scheme nf4 -o model-nf4`,
    `effformer compress runs/digits/model --scheme gptq --set block=32 --data sampler -o small`
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
        backend=backend, data=None if data is None else calibration(dense, data, samples, "compress"),
        inputs=dense.example_inputs() if data is None else None,
    )  # fmt: skip
    save_pretrained(small, target, by="compress", force=force)
    emit(report.to_dict() | {"saved": str(target)}, f"{report}\nsaved in {target}", as_json)


def calibration(model: Model, data: str, samples: int, verb: str) -> Any:
    """What `effformer.compress.quantize` takes as data."""
    from ..compress import recording

    if data == "sampler":
        from .drawing import draw

        classes = getattr(model.config, "num_classes", 1)
        with recording(model) as record:
            for start in range(0, samples, 16):
                labels = [i % classes for i in range(start, min(start + 16, samples))]
                draw(model, labels, seed=start)
        return record
    return named_tensors(data, samples, verb)


def named_tensors(data: str, samples: int, verb: str) -> dict[str, Tensor]:
    """The first samples of a .safetensors file of named tensors, or of a data set as of `train`.

    Raises:
        FormatError: the file cannot be read.
        ValueError: no such data set.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..checks import FormatError, reason
    from ..train import load_data

    if not data.endswith(".safetensors"):
        return {name: x[:samples] for name, x in load_data(data).tensors.items()}
    try:
        tensors = load_file(data)
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{verb}: --data {data}: no readable safetensors file ({reason(error)})"
        ) from error
    return {name: x[:samples] if x.dim() else x for name, x in tensors.items()}
