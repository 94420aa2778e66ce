"""`effformer evaluate`: how good a model is on named data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .common import (
    Device,
    Dtype,
    Force,
    Json,
    Out,
    Seed,
    Size,
    Threads,
    check_report,
    emit,
    is_run,
    set_threads,
    sides,
    stages,
)
from .drawing import Drawing, drawing_of_bundle, drawing_of_model, is_bundle, model_of

if TYPE_CHECKING:
    import torch

    from effformer.models.base import Model
    from effformer.profile import Quality
    from effformer.train import Dataset

Stage = Callable[[str], None]

AT_ONCE = 100
"""Samples that are drawn at a time."""


def evaluate(
    source: Annotated[
        Path, typer.Argument(help="Folder of a run, of a saved model, or of an edge bundle.")
    ],
    data: Annotated[
        str | None,
        typer.Option(help="What it should know, as of train; default: what a run was trained on."),
    ] = None,
    size: Size = None,
    part: Annotated[
        Literal["train", "test"] | None,
        typer.Option(
            help="Default: for classifiers test where there is one, else what their run held out, else "
            "train; for generators train."
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Samples of a generator, of all classes alike.", min=2, max=10**5)
    ] = 1000,
    steps: Annotated[int | None, typer.Option(help="As of sample.", min=1, max=10_000)] = None,
    guidance: Annotated[float | None, typer.Option(help="As of sample.")] = None,
    sampler: Annotated[str | None, typer.Option(help="As of sample.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure how good a model is: the accuracy of a classifier, or what share of a generator's samples
    is recognised, and how far they lie from the data.

    Samples are judged by a small convolutional network, which is trained on the data first (seconds for
    digits); their Frechet distance is taken in its features, beside that of as many real images.
    Distances of other features, such as published FIDs, are not comparable.

    Examples: `effformer evaluate runs/digits`, `effformer evaluate bundle --data digits --samples 500`,
    `effformer evaluate vit --data mnist:DIR -o quality.html`
    """
    check_report(out, "quality", force=force)
    set_threads(threads)
    given = {"steps": steps, "guidance": guidance, "sampler": sampler}
    with stages() as stage:
        network, drawing = _opened(source, given, threads, device, dtype)
        known, how = _known(source, data, size, part or ("train" if drawing else None))
        found = _judged(str(source), network, drawing, known, samples, seed, how, stage)
    if out is not None:
        found.save(out, force=force)
    emit(found.to_dict(), str(found), as_json)


def quality_of(
    source: Path,
    data: str,
    *,
    samples: int = 500,
    device: str = "cpu",
    dtype: str | None = None,
    stage: Stage,
) -> Quality:
    """What `evaluate` tells by default of a run, a model or a bundle.

    Args:
        source: its folder.
        data: named as in `evaluate`.
        samples: of a generator.
        device: where it runs.
        dtype: its numbers.
        stage: is told what happens.
    """
    network, drawing = _opened(source, {}, None, device, dtype)
    known, how = _known(source, data, None, "train" if drawing else None)
    return _judged(str(source), network, drawing, known, samples, 0, how, stage)


def _known(
    source: Path, data: str | None, size: str | None, part: Literal["train", "test"] | None
) -> tuple[Dataset, str]:
    """The data, and which they are, in words. If no part is named, that is the test part where there is
    one, else what the run held out, else everything.
    """
    from ..train import load_data
    from ..train.datasets import has_test

    call = _call_of(source)
    named, side = _data_of(source, call, data, size)
    if part is None and has_test(named):
        part = "test"
    found = load_data(named, part=part or "train", size=sides(side))
    share = call.get("validation") if data is None else None
    if part is None and share:
        held_out = found.split(share, seed=call.get("seed", 0))[1]
        return held_out, f"{len(held_out):,} samples of {named} that were held out of the training"
    return found, f"{part or 'train'} part of {named}"


def _call_of(source: Path) -> dict[str, Any]:
    """How a run was begun, empty if that is not known."""
    from ..train import read_run

    call = (read_run(source).get("about") or {}).get("call") if is_run(source) else None
    return call if isinstance(call, dict) else {}


def _judged(
    name: str, network: Model | None, drawing: Drawing | None, data: Dataset, samples: int, seed: int,
    how: str, stage: Stage,
) -> Quality:  # fmt: skip
    if drawing is not None:
        return _drawn(name, drawing, data, samples, seed, how, stage)
    stage("evaluating")
    return _accuracy(name, network, data, how)


def _data_of(
    source: Path, call: Mapping[str, Any], data: str | None, size: str | None
) -> tuple[str, str | int | None]:
    """The name and the size of the data: those that are given, else those that a run was trained on.

    Raises:
        ValueError: nothing is given, and there is no run that would tell.
    """
    if data is not None:
        return data, size
    if not isinstance(call.get("data"), str):
        raise ValueError(
            f"evaluate: on what? {source} does not say on what it was trained; add --data digits, "
            "--data mnist:DIR or a folder of images by class"
        )
    return call["data"], call.get("size") if size is None else size


def _opened(
    source: Path, given: dict[str, Any], threads: int | None, device: str, dtype: str | None
) -> tuple[Model | None, Drawing | None]:
    """A classifier, or what draws the samples of a generator.

    Raises:
        ValueError: options of generators for a classifier.
    """
    from ..flow import trained_of

    if is_bundle(source):
        made = drawing_of_bundle(source, **given, threads=threads, device=device, dtype=dtype)
        return None, made
    network = model_of(source, device, dtype)
    if trained_of(network) is not None:
        return network, drawing_of_model(network, **given)
    if words := [f"--{name}" for name, value in given.items() if value is not None]:
        raise ValueError(
            f"evaluate: {source} is {network.name}, which draws no samples; leave {', '.join(words)} out"
        )
    return network, None


def _accuracy(name: str, network: Any, data: Dataset, how: str) -> Quality:
    from ..profile import Quality
    from ..train import confusion

    counts = confusion(network, data)
    return Quality(model=name, data=data.name, classes=data.classes, counts=_rows(counts), how=how)


def _drawn(
    name: str, drawing: Drawing, data: Dataset, samples: int, seed: int, how: str, stage: Stage
) -> Quality:
    """Samples of all classes alike, judged.

    Raises:
        ValueError: the classes or the sizes of the samples are not those of the data.
    """
    import torch

    from ..flow import frechet_distance
    from ..profile import Quality
    from ..train import train_classifier

    if drawing.count != len(data.classes) or tuple(drawing.classes or data.classes) != data.classes:
        own = ", ".join(drawing.classes) or f"{drawing.count} of them"
        raise ValueError(
            f"evaluate: {name} draws other classes ({own}) than {data.name} has ({', '.join(data.classes)})"
        )
    labels = torch.arange(samples) % drawing.count
    pictures = _pictures(name, drawing, labels, data, seed, stage)
    stage("training the judge")
    judge = train_classifier(data, seed=seed)
    stage("judging")
    taken = _by_chunks(judge.predict, pictures)
    counts = torch.bincount(labels * drawing.count + taken, minlength=drawing.count**2)
    # as many real ones and their distance from the others say what the distance could be
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    real, others = order.tensor_split([min(samples, len(data) // 2)])
    features = _by_chunks(judge.features, data["x"])
    options = ", ".join(f"{key} {value}" for key, value in drawing.options.items())
    return Quality(
        model=name,
        data=data.name,
        classes=data.classes,
        counts=_rows(counts.view(drawing.count, -1)),
        judge=judge.accuracy,
        distance=frechet_distance(_by_chunks(judge.features, pictures), features[others]),
        floor=frechet_distance(features[real], features[others]),
        how=f"{options}, seed {seed}; {how}; the judge recognises {judge.accuracy:.1%} of real ones that "
        "it has not seen",
    )


def _pictures(
    name: str, drawing: Drawing, labels: torch.Tensor, data: Dataset, seed: int, stage: Stage
) -> torch.Tensor:
    """Samples (N, C, H, W) in [-1, 1], of as many levels as an image file has.

    Raises:
        ValueError: the samples have other sizes than the data.
    """
    import torch

    made: list[torch.Tensor] = []
    for i, chunk in enumerate(labels.split(AT_ONCE)):
        stage(f"drawing {i * AT_ONCE} of {len(labels)}")
        drawn = torch.from_numpy(drawing.pixels(drawing.draw(chunk.tolist(), seed + i, None)))
        made.append(drawn.permute(0, 3, 1, 2).float() * (2 / 255) - 1)
        sizes, wanted = (tuple(x.shape[1:]) for x in (made[0], data["x"]))
        if sizes != wanted:
            raise ValueError(
                f"evaluate: {name} draws {_by(sizes)}, {data.name} has {_by(wanted)}; --size "
                "brings data to the size of the samples"
            )
    return torch.cat(made)


def _rows(counts: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, counts.tolist()))


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _by_chunks(
    function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor
) -> torch.Tensor:
    import torch

    return torch.cat([function(chunk) for chunk in images.split(AT_ONCE)])
