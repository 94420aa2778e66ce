"""`effformer sample`: images from a saved model or an edge bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Device,
    Dtype,
    Force,
    Json,
    Out,
    Seed,
    Threads,
    emit,
    named,
    save_to,
    set_threads,
    steps_bar,
)
from .drawing import drawing_of_bundle, drawing_of_model, ids_of, is_bundle, model_of

SAMPLES = "samples"  # the kind that `effformer.export.run` writes


def sample(
    source: Annotated[Path, typer.Argument(help="Folder of a saved model, or of an edge bundle.")],
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes by name or number, one image each: circle,square or 0,1,2 or 0-9. A name "
            "that is a number means the class of that name. Default: the first ten classes."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps of the sampler; default: the bundle's, or 10.", min=1, max=10_000),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale of the guidance, 1 is none; default: the bundle's, or 2."),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="effformer list samplers; a bundle has euler, midpoint, heun, rk4. Default: the "
            "bundle's, or euler."
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Skip blocks at some steps: newton, reuse:every=3, ... (effformer list cache). Default: "
            "none.",
            metavar="POLICY",
        ),
    ] = None,
    cache_report: Annotated[
        bool,
        typer.Option(
            "--cache-report", help="Compare the cache with fewer steps and better samplers."
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw class-conditional images into one PNG grid, or as numbers into an .npy file.

    A bundle samples as it was exported to, a model as its weights were trained to predict; options
    that are given win.

    Examples: `effformer sample runs/digits/model --labels 0-9 -o digits.png`,
    `effformer sample bundle --labels 7,7,7 --guidance 3 -o sevens.png`
    """
    from ..export.run import write_image, write_samples
    from ..files import atomic_path, check_file

    target = save_to(out, "sample")
    if target.suffix not in (".png", ".npy"):
        raise ValueError(f"sample: {target} must end in .png or .npy")
    check_file(target, SAMPLES, force=force)
    set_threads(threads)
    if cache_report and cache is None:
        raise ValueError("sample: --cache-report needs --cache, e.g. --cache newton")
    given: dict[str, Any] = {
        "steps": steps, "guidance": guidance, "sampler": sampler,
        "cache": None if cache is None else named(cache),
    }  # fmt: skip
    if is_bundle(source):
        drawing = drawing_of_bundle(source, **given, threads=threads, device=device, dtype=dtype)
    else:
        drawing = drawing_of_model(model_of(source, device, dtype), **given)
    ids = ids_of(labels, drawing.classes, drawing.count)
    if cache_report and drawing.compare is None:
        raise ValueError("sample: --cache-report needs a saved model; a bundle has no reference")
    with steps_bar("sampling") as show:
        samples = drawing.draw(ids, seed, show)
    said: dict[str, tuple[Any, str]] = {}
    if drawing.summaries:
        said["cache"] = asdict(drawing.summaries[-1]), str(drawing.summaries[-1])
    if cache_report and drawing.compare is not None:
        report = drawing.compare(ids, seed)
        said["report"] = report.to_dict(), str(report)
    with atomic_path(target, SAMPLES, force=force) as temporary:
        if target.suffix == ".png":
            write_image(temporary, drawing.pixels(samples), force=True)
        else:
            write_samples(temporary, samples, force=True)
    facts = {name: values for name, (values, _) in said.items()}
    lines = [f"{len(ids)} samples in {target}", *(text for _, text in said.values())]
    emit(
        {"saved": str(target), "labels": ids, **drawing.options, "seed": seed, **facts},
        "\n".join(lines), as_json,
    )  # fmt: skip
