"""`effformer compress`: quantize a saved model, or compress it by a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .common import Force, Json, Out, Set, emit, load, named, note, overrides, save_to
from .report import Report, check_place, write_report

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
    scheme: Annotated[
        str | None,
        typer.Option(
            help="effformer list quantizers; with options int8:block=32. Default: int8.",
            metavar="NAME[:KEY=VALUE,...]",
        ),
    ] = None,
    where: Where = None,
    skip: Skip = None,
    backend: Annotated[str, typer.Option(help="torch, bitsandbytes or auto.")] = "torch",
    data: Data = None,
    samples: Samples = 64,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of several verbs; the same command goes on where it stopped."
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what a recipe does and why, and stop.")
    ] = False,
    wanted: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Try several recipes and take the best that meets latency=, size= or macs=, shares of the "
            "dense model's, for instance latency=0.5.",
            metavar="TARGET=SHARE",
        ),
    ] = None,
    quality: Annotated[
        Literal["accuracy", "agreement", "error"],
        typer.Option(help="With --for: right classes, the same classes, or relative output error."),
    ] = "error",
    max_drop: Annotated[
        float, typer.Option(help="With --for: by how much the quality may be worse.", min=0)
    ] = 0.02,
    steps: Annotated[
        int, typer.Option(help="With --for: steps of distillation.", min=0, max=10**6)
    ] = 200,
    pairs: Set = None,
    report: Report = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize the weights of a saved model; prints errors and sizes per layer. With --recipe: several verbs
    one after the other, such as prune, distill and quantize.

    Options of the scheme stand behind its name, `--scheme int8:block=32`, or in --set.

    Examples: `effformer compress model --scheme nf4 -o model-nf4`,
    `effformer compress runs/digits/model --scheme gptq:block=32 --data sampler -o small`,
    `effformer compress model --recipe small.yaml --explain`,
    `effformer compress model --for latency=0.5 --data digits --quality accuracy -o half`
    """
    given = {"--scheme": scheme, "--where": where, "--skip": skip, "--set": pairs}
    if wanted is not None:
        named_too = {**given, "--recipe": recipe, "--report": report}
        others = [name for name, value in named_too.items() if value]
        how = {
            "quality": quality,
            "max_drop": max_drop,
            "steps": steps,
            "samples": samples,
            "force": force,
        }
        _explore(model, wanted, others, data, how, out, as_json)
        return
    check_place(report, force=force)
    if recipe is not None:
        others = [name for name, value in given.items() if value]
        _by_recipe(model, recipe, others, data, explain, report, out, force, as_json)
        return
    if explain:
        raise ValueError("compress: --explain tells what a --recipe does; give one")
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
    asked, dense = named(scheme or "int8"), load(str(model))
    chosen = {"name": asked} if isinstance(asked, str) else asked
    small, found = quantize(
        dense, chosen | overrides(pairs=pairs), where or "*", skip=skip or (),
        backend=backend, data=None if data is None else calibration(dense, data, samples, "compress"),
        inputs=dense.example_inputs() if data is None else None,
    )  # fmt: skip
    save_pretrained(small, target, by="compress", force=force)
    said = [str(found), f"saved in {target}", *write_report(report, dense, small, force=force)]
    emit(found.to_dict() | {"saved": str(target)}, "\n".join(said), as_json)


def left(*, recipe: Path | None, wanted: str | None, **_: Any) -> str:
    """What an interrupted run leaves."""
    if recipe is None and wanted is None:
        return "the target holds what it held before, or the whole new result"
    return "finished steps are kept: run the same command again"


def _explore(
    model: Path,
    target: str,
    others: list[str],
    data: str | None,
    how: dict[str, Any],
    out: Path | None,
    as_json: bool,
) -> None:
    """Several recipes under a budget."""
    from ..compress import explore

    goal, _, value = target.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = float("nan")
    if goal not in ("latency", "size", "macs") or not 0 < share <= 1:
        raise ValueError(
            f"compress: --for {target!r}: expected latency=, size= or macs= and a share of at most 1, for "
            "instance latency=0.5"
        )
    if others:
        raise ValueError(
            f"compress: {others[0]} does not go with --for, which tries recipes of its own"
        )
    place = save_to(out, "compress")
    dense = load(str(model))
    _, found = explore(
        dense, goal, share, place, data=_source(dense, data, how["samples"]),  # type: ignore[arg-type]
        told=None if as_json else note, **how,
    )  # fmt: skip
    saved = {"saved": str(place / "model"), "report": str(place / "report.html")}
    text = f"{found}\nsaved in {place / 'model'}; report: {place / 'report.html'}"
    emit(found.to_dict() | saved, text, as_json)


def _source(model: Model, data: str | None, samples: int) -> Any:
    """Data of a recipe: whole data sets and files, which trainings read."""
    from ..train import load_data

    if data is None:
        return None
    if data == "sampler" or data.endswith(".safetensors"):
        return calibration(model, data, samples if data == "sampler" else 10**9, "compress")
    return load_data(data)


def _by_recipe(
    model: Path,
    recipe: Path,
    others: list[str],
    data: str | None,
    explain: bool,
    report: Path | None,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Run a recipe, or say what it does."""
    from ..compress import Recipe, run_recipe

    if others:
        raise ValueError(f"compress: {others[0]} is said by the recipe; write it there")
    read = Recipe.read(recipe)
    if explain:
        emit(read.to_dict(), read.explain(), as_json)
        return
    target = save_to(out, "compress")
    if os.path.realpath(target) == os.path.realpath(model):
        raise ValueError(f"compress: --out {target} is the model itself; choose another folder")
    dense = load(str(model))
    given = _source(dense, data or read.data, read.samples)
    small, found = run_recipe(
        dense, read, target, data=given, told=None if as_json else note, force=force
    )
    said = [str(found), *write_report(report, dense, small, force=force)]  # type: ignore[arg-type]
    emit(found.to_dict(), "\n".join(said), as_json)


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
    from ..files import check_finite
    from ..train import load_data

    if not data.endswith(".safetensors"):
        return {name: x[:samples] for name, x in load_data(data).tensors.items()}
    check_finite(data)
    try:
        tensors = load_file(data)
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{verb}: --data {data}: no readable safetensors file ({reason(error)})"
        ) from error
    return {name: x[:samples] if x.dim() else x for name, x in tensors.items()}
