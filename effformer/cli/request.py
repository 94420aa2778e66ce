"""How a training was asked for: by options, by a recipe, or by the run that it goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..checks import FormatError, unknown
from ..values import plain
from .common import note
from .task import FITTED

if TYPE_CHECKING:
    from effformer.config import Config

__all__ = ["as_begun", "by_recipe", "call_of"]

_LISTS = ("pairs", "train_pairs")


def as_begun(run: Path, context: typer.Context) -> dict[str, Any]:
    """The arguments with which a run was begun, and those that are given now.

    Raises:
        FormatError: the run was not begun by this verb, or by one of an earlier version.
    """
    from ..train import read_run

    call = (read_run(run).get("about") or {}).get("call")
    if not isinstance(call, dict):
        raise FormatError(
            f"train: {run} does not say how it was begun; give model and options as then, with "
            f"--out {run} --resume"
        )
    known = {name: value for name, value in call.items() if name in context.params}
    given = _given(context)
    if given.get("recipe") not in (None, call.get("recipe")):
        raise ValueError(
            f"train: {run} was not begun by the recipe {given['recipe']}; --resume {run} alone goes on "
            "as it was begun"
        )
    return (
        context.params
        | known
        | given
        | {"model": call["model"], "recipe": None, "out": run, "resume": True}
    )


def by_recipe(name: str, context: typer.Context) -> dict[str, Any]:
    """The arguments that a recipe stands for, and those that are given, which win; says what was measured
    with it.

    Raises:
        ValueError: no such recipe.
    """
    from ..train.recipes import RECIPES

    if name not in RECIPES:
        raise unknown("recipe", name, list(RECIPES), where="train: --recipe")
    recipe, given = RECIPES[name], _given(context)
    config = dict(_changed(recipe.config))
    options: dict[str, Any] = {
        key: config.pop(key) for key in ("steps", "batch", "lr", "warmup") if key in config
    }
    made: dict[str, Any] = {
        "model": recipe.model, "data": recipe.data, "loss": _spec(recipe.objective.loss),
        "label_drop": recipe.objective.label_drop, **options,
        "pairs": [_pair(k, v) for k, v in recipe.overrides.items() if k not in FITTED],
        "train_pairs": [_pair(*item) for item in config.items()],
    }  # fmt: skip
    for key in _LISTS:  # the last pair of a key is the one that counts
        made[key] += given.pop(key, None) or []
    note(f"recipe {name}: {recipe.measured}")
    context.params |= made | given  # what the run keeps
    return context.params | {"recipe": None}


def call_of(context: typer.Context, steps: int) -> dict[str, Any]:
    """How the verb was called, so that ``--resume RUN`` can call it again."""
    kept = {
        k: v
        for k, v in context.params.items()
        if k != "as_json" and isinstance(v, (str, int, float, list, type(None)))
    }
    name, colon, place = context.params["data"].rpartition(":")
    if Path(place).is_dir():  # also from another folder
        kept["data"] = f"{name}{colon}{Path(place).resolve()}"
    return kept | {"steps": steps, "minutes": None}


def _given(context: typer.Context) -> dict[str, Any]:
    """Arguments that were typed."""
    return {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }


def _changed(config: Config) -> Iterator[tuple[str, Any]]:
    """Options that differ from their defaults, as JSON values."""
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            yield field.name, plain(value)


def _pair(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _spec(config: Config) -> str:
    """A part as `effformer.cli.common.named` reads it."""
    options = ",".join(_pair(*item) for item in _changed(config))
    return f"{config.entry.name}:{options}" if options else config.entry.name
