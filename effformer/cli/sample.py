"""`effformer sample`: images from a saved model or an edge bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Json,
    Out,
    Seed,
    Threads,
    convention,
    emit,
    load,
    save_to,
    set_threads,
    steps_bar,
)

if TYPE_CHECKING:
    import numpy as np

    from effformer.models.base import Model

__all__ = ["draw", "pixels", "sample"]


def sample(
    source: Annotated[Path, typer.Argument(help="Folder of a saved model, or of an edge bundle.")],
    labels: Annotated[str, typer.Option(help="Class ids, one image each: 0,1,2 or 0-9.")] = "0-9",
    steps: Annotated[int, typer.Option(help="Steps of the sampler.", min=1, max=10_000)] = 10,
    guidance: Annotated[float, typer.Option(help="Scale of the guidance, 1 is none.")] = 2.0,
    sampler: Annotated[
        str, typer.Option(help="effformer list samplers; a bundle has euler, midpoint, heun, rk4.")
    ] = "euler",
    seed: Seed = 0,
    threads: Threads = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Draw class-conditional images into one PNG grid, or as numbers into an .npy file.

    Examples: `effformer sample runs/digits/model --labels 0-9 -o digits.png`,
    `effformer sample bundle --labels 7,7,7 --guidance 3 -o sevens.png`
    """
    from ..export.run import Bundle, parse_labels

    target = save_to(out, "sample")
    if target.suffix not in (".png", ".npy"):
        raise ValueError(f"sample: {target} must end in .png or .npy")
    ids = parse_labels(labels)
    set_threads(threads)
    options: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "sampler": sampler,
        "seed": seed,
    }
    if (source / "bundle.json").exists():
        bundle = Bundle(source, threads)
        samples, to_pixels = bundle.sample(ids, **options), bundle.images
    else:
        model = load(_folder(source))
        with steps_bar("sampling") as show:
            samples, to_pixels = draw(model, ids, **options, progress=show), pixels
    _write(target, samples, to_pixels)
    emit(
        {"saved": str(target), "labels": ids, **options}, f"{len(ids)} samples in {target}", as_json
    )


def draw(
    model: Model,
    labels: Sequence[int],
    *,
    steps: int = 10,
    guidance: float = 2.0,
    sampler: str = "euler",
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> np.ndarray[Any, Any]:
    """Samples (B, C, H, W) float32 of a class-conditional model, one for each label.

    The noise is that of the edge runner with the same seed, so that both can be compared.

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
    if guidance != 1 and not config.label_dropout:
        raise ValueError(f"sample: {model.name} has no null class, so only --guidance 1 works")
    shape = (len(labels), config.channels, config.input_size, config.input_size)
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    found = convention(model)
    result = integrate(
        model.eval() if found is None else adapt(model.eval(), found),
        torch.from_numpy(noise),
        sampler=sampler,
        steps=steps,
        guidance=None if guidance == 1 else Guidance(guidance, null={"y": config.num_classes}),
        generator=torch.Generator().manual_seed(seed),
        progress=progress,
        y=torch.tensor(labels),
    )
    samples: np.ndarray[Any, Any] = result.x.numpy()
    return samples


def pixels(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pictures (B, H, W, C) uint8 of samples (B, C, H, W) in [-1, 1].

    Raises:
        ValueError: samples that are no pictures, for instance latents.
    """
    import numpy as np

    if samples.shape[1] not in (1, 3):
        raise ValueError(
            f"sample: samples have {samples.shape[1]} channels, a picture has 1 or 3; "
            "write them as --out samples.npy"
        )
    made: np.ndarray[Any, Any] = ((samples.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    return made.transpose(0, 2, 3, 1)


def _write(target: Path, samples: Any, to_pixels: Callable[[Any], Any]) -> None:
    import numpy as np

    from ..export.run import write_image
    from ..files import atomic_path

    if target.suffix == ".png":
        write_image(target, to_pixels(samples))
        return
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        np.save(file, samples, allow_pickle=False)


def _folder(source: Path) -> str:
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; expected a saved model or a bundle")
    return str(source)
