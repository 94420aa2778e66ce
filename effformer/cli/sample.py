"""`effformer sample`: images from a saved model or an edge bundle."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import unknown
from .common import (
    Force,
    Json,
    Out,
    Seed,
    Threads,
    emit,
    load,
    note,
    save_to,
    set_threads,
    steps_bar,
)

if TYPE_CHECKING:
    import numpy as np

    from effformer.flow import Trained
    from effformer.models.base import Model

__all__ = ["draw", "pixels", "sample"]

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
    seed: Seed = 0,
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
    from ..export.run import Bundle, write_image, write_samples
    from ..files import atomic_path, check_file

    target = save_to(out, "sample")
    if target.suffix not in (".png", ".npy"):
        raise ValueError(f"sample: {target} must end in .png or .npy")
    check_file(target, SAMPLES, force=force)
    set_threads(threads)
    to_pixels: Callable[[Any], Any]
    options: dict[str, Any]
    if (source / "bundle.json").exists():
        bundle = Bundle(source, threads)
        own, named = bundle.facts["sampler"], bundle.facts.get("trained") or {}
        ids = _ids(labels, named.get("classes", ()), bundle.facts["num_classes"])
        options = {
            "steps": own["steps"] if steps is None else steps,
            "guidance": own["guidance"] if guidance is None else guidance,
            "sampler": own["name"] if sampler is None else sampler,
            "seed": seed,
        }
        samples, to_pixels = bundle.sample(ids, **options), bundle.images
    else:
        model = load(_folder(source))
        record = _trained(model)
        ids = _ids(labels, record.classes, getattr(model.config, "num_classes", 0))
        count, scale = record.settings(steps, guidance)
        options = {
            "steps": count,
            "guidance": scale,
            "sampler": sampler or "euler",
            "seed": seed,
        }
        if record.steps not in (None, count):
            note(f"sample: {model.name} was distilled to {record.steps} steps, not {count}")
        with steps_bar("sampling") as show:
            samples = draw(model, ids, **options, progress=show)
        to_pixels = partial(pixels, value_range=record.value_range or (-1.0, 1.0))
    with atomic_path(target, SAMPLES, force=force) as temporary:
        if target.suffix == ".png":
            write_image(temporary, to_pixels(samples), force=True)
        else:
            write_samples(temporary, samples, force=True)
    emit(
        {"saved": str(target), "labels": ids, **options}, f"{len(ids)} samples in {target}", as_json
    )


def draw(
    model: Model,
    labels: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str = "euler",
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> np.ndarray[Any, Any]:
    """Samples (B, C, H, W) float32 of a class-conditional model, one for each label.

    The noise is that of the edge runner with the same seed, so that both can be compared. What the
    network predicts is what its weights were trained to (`effformer.flow.trained_of`), and so are
    the defaults of steps and guidance.

    Raises:
        ValueError: a label outside the model's classes, guidance without a null class, or a model
            that is not class-conditional.
    """
    import numpy as np
    import torch

    from ..flow import Guidance, adapt
    from ..flow import sample as integrate

    config = model.config
    if not all(hasattr(config, name) for name in ("input_size", "channels", "num_classes")):
        raise ValueError(f"sample: {model.name} does not draw images of classes")
    if wrong := [i for i in labels if not 0 <= i < config.num_classes]:
        raise ValueError(
            f"sample: label {wrong[0]} is not one of the classes 0..{config.num_classes - 1}"
        )
    record = _trained(model)
    steps, guidance = record.settings(steps, guidance)
    if guidance != 1 and not (record.null and config.label_dropout):
        raise ValueError(
            f"sample: {model.name} has no null class, or its labels were never dropped in training, "
            "so only --guidance 1 works"
        )
    shape = (len(labels), config.channels, config.input_size, config.input_size)
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    result = integrate(
        adapt(model.eval()),
        torch.from_numpy(noise).to(next(model.parameters()).dtype),
        sampler=sampler,
        steps=steps,
        guidance=None if guidance == 1 else Guidance(guidance, null={"y": config.num_classes}),
        generator=torch.Generator().manual_seed(seed),
        progress=progress,
        y=torch.tensor(labels),
    )
    samples: np.ndarray[Any, Any] = result.x.float().numpy()
    return samples


def _trained(model: Model) -> Trained:
    from ..flow import trained_of

    record = trained_of(model)
    if record is None:
        raise ValueError(f"sample: {model.name} does not draw images of classes")
    return record


def pixels(
    samples: np.ndarray[Any, Any], *, value_range: tuple[float, float] = (-1.0, 1.0)
) -> np.ndarray[Any, Any]:
    """Pictures (B, H, W, C) uint8 of samples (B, C, H, W), black and white at ``value_range``.

    Raises:
        ValueError: samples that are no pictures, for instance latents.
    """
    import numpy as np

    if samples.shape[1] not in (1, 3):
        raise ValueError(
            f"sample: samples have {samples.shape[1]} channels, a picture has 1 or 3; "
            "write them as --out samples.npy"
        )
    low, high = value_range
    scaled = (samples.clip(low, high) - low) * (255 / (high - low))
    made: np.ndarray[Any, Any] = scaled.round().astype(np.uint8)
    return made.transpose(0, 2, 3, 1)


def _ids(labels: str | None, classes: Sequence[str], count: int) -> list[int]:
    """Numbers of classes that are named, numbered or given as ranges; a name comes first.

    Raises:
        ValueError: no such class.
    """
    from ..export.run import parse_labels

    if labels is None:
        return list(range(min(count, 10)))
    ids = {name: str(i) for i, name in enumerate(classes)}
    words = [ids.get(word, word) for word in map(str.strip, labels.split(","))]
    for word in words:
        if classes and not re.fullmatch(r"[0-9]+(-[0-9]+)?", word):
            raise unknown("class", word, list(classes), where="sample: --labels")
    found = parse_labels(",".join(words))
    if wrong := [i for i in found if i >= count]:
        named = f", named {', '.join(classes)}" if ids and list(ids) != list(ids.values()) else ""
        raise ValueError(
            f"sample: label {wrong[0]} is not one of the classes 0..{count - 1}{named}"
        )
    return found


def _folder(source: Path) -> str:
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; expected a saved model or a bundle")
    return str(source)
