"""`effformer sample`: images from a saved model or an edge bundle."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
    read_policy,
    save_to,
    set_threads,
    steps_bar,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from effformer.cache import CacheReport, Summary
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
    if cache_report and cache is None:
        raise ValueError("sample: --cache-report needs --cache, e.g. --cache newton")
    asked: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "sampler": sampler,
        "cache": cache,
    }
    if (source / "bundle.json").exists():
        if cache_report:
            raise ValueError(
                "sample: --cache-report needs a saved model; a bundle has no reference"
            )
        made = _of_bundle(Bundle(source, threads), labels, seed, **asked)
    else:
        made = _of_model(load(_folder(source)), labels, seed, report=cache_report, **asked)
    with atomic_path(target, SAMPLES, force=force) as temporary:
        if target.suffix == ".png":
            write_image(temporary, made.to_pixels(made.samples), force=True)
        else:
            write_samples(temporary, made.samples, force=True)
    said = {"saved": str(target), "labels": made.labels, **made.options}
    lines = [f"{len(made.labels)} samples in {target}", *made.notes]
    emit(said, "\n".join(lines), as_json)


class _Drawn(NamedTuple):
    """Samples, how to show them, and what is said about them."""

    samples: Any
    to_pixels: Callable[[Any], Any]
    labels: list[int]
    options: dict[str, Any]
    notes: tuple[str, ...] = ()


def _of_bundle(
    bundle: Any, labels: str | None, seed: int, *, steps: int | None, guidance: float | None,
    sampler: str | None, cache: str | None,
) -> _Drawn:  # fmt: skip
    own, named = bundle.facts["sampler"], bundle.facts.get("trained") or {}
    ids = _ids(labels, named.get("classes", ()), bundle.facts["num_classes"])
    options = {
        "steps": own["steps"] if steps is None else steps,
        "guidance": own["guidance"] if guidance is None else guidance,
        "sampler": own["name"] if sampler is None else sampler,
        "seed": seed,
    }
    policy = None if cache is None else _schedule(read_policy(cache, where="sample"))
    return _Drawn(bundle.sample(ids, **options, cache=policy), bundle.images, ids, options)


def _schedule(policy: Any) -> dict[str, Any]:
    """A policy as bundles know it.

    Raises:
        ValueError: one that they do not know.
    """
    from ..config import resolve

    config = resolve("cache", policy, where="sample: --cache")
    if config.entry.name not in ("reuse", "newton"):
        raise ValueError(
            f"sample: a bundle has no cache {config.entry.name!r}; choices: reuse, newton"
        )
    return {"order": 0} | config.to_dict()


def _of_model(
    model: Model, labels: str | None, seed: int, *, steps: int | None, guidance: float | None,
    sampler: str | None, cache: str | None, report: bool,
) -> _Drawn:  # fmt: skip
    record = _trained(model)
    ids = _ids(labels, record.classes, getattr(model.config, "num_classes", 0))
    count, scale = record.settings(steps, guidance)
    options: dict[str, Any] = {
        "steps": count, "guidance": scale, "sampler": sampler or "euler", "seed": seed,
    }  # fmt: skip
    if record.steps not in (None, count):
        note(f"sample: {model.name} was distilled to {record.steps} steps, not {count}")
    with steps_bar("sampling") as show:
        samples, summary = _drawn(model, ids, **options, cache=cache, progress=show)
    said: dict[str, tuple[Any, str]] = {}
    if summary is not None:
        said["cache"] = asdict(summary), str(summary)
    if report:
        compared = _compared(model, ids, cache, **options)
        said["report"] = compared.to_dict(), str(compared)
    to_pixels = partial(pixels, value_range=record.value_range or (-1.0, 1.0))
    options |= {name: facts for name, (facts, _) in said.items()}
    return _Drawn(samples, to_pixels, ids, options, tuple(text for _, text in said.values()))


def draw(
    model: Model,
    labels: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str = "euler",
    seed: int = 0,
    cache: Any = None,
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
    more = {"seed": seed, "cache": cache, "progress": progress}
    return _drawn(model, labels, steps=steps, guidance=guidance, sampler=sampler, **more)[0]


def _drawn(
    model: Model, labels: Sequence[int], *, steps: int | None, guidance: float | None, sampler: str,
    seed: int, cache: Any, progress: Any,
) -> tuple[np.ndarray[Any, Any], Summary | None]:  # fmt: skip
    """The samples, and what a cache computed of them."""
    import torch

    from ..cache import Cached, cached
    from ..flow import adapt
    from ..flow import sample as integrate

    steps, start, given = _problem(model, labels, steps, guidance, seed)
    field: Any = adapt(model.eval())
    if cache is not None:
        field = cached(
            field, read_policy(cache, where="sample") if isinstance(cache, str) else cache
        )
    generator = torch.Generator().manual_seed(seed)
    result = integrate(
        field, start, sampler=sampler, steps=steps, generator=generator, progress=progress, **given
    )
    samples: np.ndarray[Any, Any] = result.x.float().numpy()
    return samples, field.summary() if isinstance(field, Cached) else None


def _compared(
    model: Model, labels: Sequence[int], cache: Any, *, steps: int, guidance: float, sampler: str,
    seed: int,
) -> CacheReport:  # fmt: skip
    from ..cache import compare
    from ..flow import adapt

    steps, start, given = _problem(model, labels, steps, guidance, seed)
    return compare(
        adapt(model),
        read_policy(cache, where="sample"),
        start,
        sampler=sampler,
        steps=steps,
        **given,
    )


def _problem(
    model: Model, labels: Sequence[int], steps: int | None, guidance: float | None, seed: int
) -> tuple[int, torch.Tensor, dict[str, Any]]:
    """Steps, noise, and guidance with labels."""
    import numpy as np
    import torch

    from ..flow import Guidance

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
    rule = None if guidance == 1 else Guidance(guidance, null={"y": config.num_classes})
    start = torch.from_numpy(noise).to(next(model.parameters()).dtype)
    return steps, start, {"guidance": rule, "y": torch.tensor(labels)}


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
