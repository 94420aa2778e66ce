"""`effformer bench`: latency of several models side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Batch, Force, Json, Out, Threads, check_report, emit, load, overrides, stages

if TYPE_CHECKING:
    from torch import Tensor

    from effformer.models.base import Model


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Model names or folders; parts after a colon: dit-b dit-b:attn=flow,depth=6. "
            "Ratios are relative to the first."
        ),
    ],
    batch: Batch = 1,
    runs: Annotated[int, typer.Option(help="Timed calls of each.", min=1, max=10**6)] = 7,
    warmup: Annotated[int, typer.Option(help="Untimed calls of each.", min=0, max=10**6)] = 2,
    threads: Threads = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Time models in turns (medians, ratios within one run) beside what they cost on paper.

    Examples: `effformer bench dit-s dit-s:attn=flow --threads 2`,
    `effformer bench model model-int8 -o compare.html`
    """
    from ..profile import compare

    check_report(out, "comparison", force=force)
    built = []
    for spec in models:
        name, _, changes = spec.partition(":")
        built.append(load(name, overrides(pairs=[c for c in changes.split(",") if c])))
    inputs = _shared_inputs(built, batch)
    with stages() as stage:
        result = compare(
            built,
            inputs,
            names=_unique(models),
            warmup=warmup,
            runs=runs,
            threads=threads,
            progress=stage,
        )
        if out is not None:
            result.save(out, force=force)
    emit(result.to_dict(), str(result), as_json)


def _shared_inputs(models: list[Model], batch: int) -> dict[str, Tensor]:
    """Inputs that all models take.

    Raises:
        ValueError: they take different ones, so that their times say nothing about each other.
    """
    first, *others = (m.example_inputs(batch) for m in models)
    sizes = {k: tuple(x.shape) for k, x in first.items()}
    for model, inputs in zip(models[1:], others, strict=True):
        if {k: tuple(x.shape) for k, x in inputs.items()} != sizes:
            raise ValueError(
                f"bench: {model.name} takes {_shapes(inputs)}, {models[0].name} takes "
                f"{_shapes(first)}; compare models of equal inputs, or profile each alone"
            )
    return first


def _shapes(inputs: dict[str, Tensor]) -> str:
    return ", ".join(f"{k} {tuple(x.shape)}" for k, x in inputs.items())


def _unique(names: list[str]) -> list[str]:
    """Number the repeated ones, so that a model can be timed against itself."""
    return [
        n if names.count(n) == 1 else f"{n} #{names[: i + 1].count(n)}" for i, n in enumerate(names)
    ]
