"""Images of classes, drawn by a model, a run or an edge bundle."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import unknown
from .common import load, moved, note

if TYPE_CHECKING:
    import numpy as np
    import torch

    from effformer.cache import CacheReport, Summary
    from effformer.flow import Trained
    from effformer.models.base import Model

    Array = np.ndarray[Any, Any]

__all__ = [
    "Drawing",
    "draw",
    "drawing_of_bundle",
    "drawing_of_model",
    "ids_of",
    "is_bundle",
    "model_of",
    "pixels",
]

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Something that draws images of classes, and how it does.

    Attributes:
        classes: their names, empty if nobody gave them any.
        count: number of classes.
        options: steps, guidance and sampler.
        draw: (labels, seed, progress) -> samples (B, C, H, W) float32.
        pixels: samples -> pictures (B, H, W, C) uint8.
        compare: (labels, seed) -> the cache beside fewer steps and better samplers; None where there
            is no model to compare with.
        summaries: what a cache computed in each draw so far.
    """

    classes: Sequence[str]
    count: int
    options: dict[str, Any]
    draw: Callable[[Sequence[int], int, Progress | None], Array]
    pixels: Callable[[Array], Array]
    compare: Callable[[Sequence[int], int], CacheReport] | None = None
    summaries: list[Summary] = field(default_factory=list)


def is_bundle(source: Path) -> bool:
    """Whether a folder is an edge bundle."""
    return (source / "bundle.json").exists()


def model_of(source: Path, device: str, dtype: str | None) -> Model:
    """The model in a folder.

    Raises:
        ValueError: no such folder.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; expected a saved model or a bundle")
    return moved(load(str(source)), device, dtype)


def drawing_of_bundle(
    source: Path,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    cache: Any = None,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> Drawing:
    """A bundle, which draws as it was exported to unless options say otherwise.

    Raises:
        ValueError: another device, type of numbers or cache than a bundle has.
    """
    from ..export.run import Bundle

    if device != "cpu" or dtype not in (None, "float32"):
        raise ValueError(
            f"{source}: a bundle runs on the CPU in the numbers that it was exported in; --device "
            "and --dtype are for models"
        )
    bundle = Bundle(source, threads)
    own = bundle.facts["sampler"]
    options: dict[str, Any] = {
        "steps": own["steps"] if steps is None else steps,
        "guidance": own["guidance"] if guidance is None else guidance,
        "sampler": own["name"] if sampler is None else sampler,
    }
    policy = None if cache is None else _schedule(cache)
    return Drawing(
        classes=bundle.classes, count=bundle.facts["num_classes"], options=options,
        draw=lambda ids, seed, _: bundle.sample(ids, **options, seed=seed, cache=policy),
        pixels=bundle.images,
    )  # fmt: skip


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


def drawing_of_model(
    model: Model,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    cache: Any = None,
) -> Drawing:
    """A model, which draws as its weights were trained to predict unless options say otherwise.

    Raises:
        ValueError: the model draws no images of classes.
    """
    record = _trained(model)
    count, scale = record.settings(steps, guidance)
    options: dict[str, Any] = {"steps": count, "guidance": scale, "sampler": sampler or "euler"}
    if record.steps not in (None, count):
        note(f"sample: {model.name} was distilled to {record.steps} steps, not {count}")
    summaries: list[Summary] = []

    def drawn(ids: Sequence[int], seed: int, show: Progress | None) -> Array:
        samples, summary = _drawn(model, ids, **options, seed=seed, cache=cache, progress=show)
        summaries.extend([] if summary is None else [summary])
        return samples

    def compared(ids: Sequence[int], seed: int) -> CacheReport:
        from ..cache import compare
        from ..flow import adapt

        _, start, given = _problem(model, ids, count, scale, seed)
        how = {"sampler": options["sampler"], "steps": count}
        return compare(adapt(model), cache, start, **how, **given)

    return Drawing(
        classes=record.classes, count=getattr(model.config, "num_classes", 0), options=options,
        draw=drawn, pixels=partial(pixels, value_range=record.value_range or (-1.0, 1.0)),
        compare=compared, summaries=summaries,
    )  # fmt: skip


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
    how: dict[str, Any] = {"steps": steps, "guidance": guidance, "sampler": sampler, "seed": seed}
    return _drawn(model, labels, **how, cache=None, progress=progress)[0]


def _drawn(
    model: Model, labels: Sequence[int], *, steps: int | None, guidance: float | None, sampler: str,
    seed: int, cache: Any, progress: Progress | None,
) -> tuple[Array, Summary | None]:  # fmt: skip
    """The samples, and what a cache computed of them."""
    import torch

    from ..cache import Cached, cached
    from ..flow import adapt
    from ..flow import sample as integrate

    steps, start, given = _problem(model, labels, steps, guidance, seed)
    field: Any = adapt(model.eval())
    if cache is not None:
        field = cached(field, cache)
    generator = torch.Generator().manual_seed(seed)
    result = integrate(
        field, start, sampler=sampler, steps=steps, generator=generator, progress=progress, **given
    )
    samples: Array = result.x.float().cpu().numpy()
    return samples, field.summary() if isinstance(field, Cached) else None


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
    like = next(model.parameters())
    shape = (len(labels), *model.example_inputs()["x"].shape[1:])
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    rule = None if guidance == 1 else Guidance(guidance, null={"y": config.num_classes})
    start = torch.from_numpy(noise).to(like.device, like.dtype)
    return steps, start, {"guidance": rule, "y": torch.tensor(labels, device=like.device)}


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


def ids_of(labels: str | None, classes: Sequence[str], count: int) -> list[int]:
    """Numbers of classes that are named, numbered or given as ranges; a name comes first.

    Raises:
        ValueError: no such class.
    """
    from ..export.run import parse_labels

    if labels is None:
        return list(range(min(count, 10)))
    for word in map(str.strip, labels.split(",")):
        if classes and word not in classes and not re.fullmatch(r"[0-9]+(-[0-9]+)?", word):
            raise unknown("class", word, list(classes), where="sample: --labels")
    found = parse_labels(labels, classes)
    if wrong := [i for i in found if i >= count]:
        numbers = [str(i) for i in range(len(classes))]
        named = f", named {', '.join(classes)}" if list(classes) != numbers else ""
        raise ValueError(
            f"sample: label {wrong[0]} is not one of the classes 0..{count - 1}{named}"
        )
    return found
