"""Which part works in which model: every registered part tried in every slot of every family.

A slot is a field of a model's config that holds a part (``attn``, ``ffn``, ``block``, ...); new
slots, parts and families are found, not listed. `tests/test_matrix.py` runs what can be built, and
checks the refusals; `tools/compatibility.py` writes docs/compatibility.md.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from effformer import registry
from effformer.build import build_model, list_attention
from effformer.checks import CapabilityError

__all__ = [
    "Built",
    "Column",
    "Refusal",
    "beside",
    "build",
    "columns",
    "families",
    "fit",
    "names",
    "places",
    "slots",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One small model of a family.

    Attributes:
        preset: registered name.
        title: head of the column in the documentation.
        changes: overrides that make it small, or another variant of the family.
    """

    preset: str
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)


_TEXT = {"vocab": 64, "context": 48}
SMALL: dict[str, tuple[Column, ...]] = {
    "dit": (Column(preset="dit-nano", title="dit", changes={"input_size": 16}),),
    "sit": (Column(preset="sit-nano", title="sit", changes={"input_size": 16}),),
    "vit": (
        Column(preset="vit-nano", title="vit"),
        Column(
            preset="vit-nano",
            title="vit, rotary",
            changes={"positions": {"absolute": False, "rope": {}}},
        ),
    ),
    # what predicts features stands beside the forward pass
    "rectok": (Column(preset="rectok-tiny", title="rectok", changes={"features": None}),),
    "flowformer-gpt": (
        Column(
            preset="flowformer-gpt-nano", title="flowformer-gpt", changes=_TEXT | {"heads": 2}
        ),
    ),
    "flowformer-series": (
        Column(
            preset="flowformer-series",
            title="flowformer-series",
            changes={"dim": 48, "heads": 2, "depth": 2, "length": 24, "ffn": {"hidden": 64}},
        ),
    ),
    "flowformer-vision": (
        Column(
            preset="flowformer-vision",
            title="flowformer-vision",
            changes={
                "dims": (32, 64), "depths": (1, 1), "heads": 2, "input_size": 16, "num_classes": 5,
                "drop_path": 0.0,  # two samples would both lose a block now and then
            },
        ),
    ),
}  # fmt: skip
"""Families whose smallest preset is still too large for a test, or that have several variants.
Other families need a preset called ``<family>-nano`` or ``<family>-tiny``."""

WITH_OPTION: dict[str, dict[str, Any]] = {"linformer": {"tokens": 512}}
"""What a part must be told where a model does not say it."""


@dataclass(frozen=True, slots=True)
class Built:
    """The part can be built there; ``options`` are those that it needed beside its name."""

    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The part is refused when the model is built.

    Attributes:
        reason: why, without the place and the name.
        choices: names that the message offers instead.
    """

    reason: str
    choices: tuple[str, ...]

    @classmethod
    def parse(cls, message: str) -> Refusal:
        """Read a refusal ``where: 'name' reason; choices: a, b``; the choice None is an empty slot.

        Raises:
            ValueError: the message does not have this form.
        """
        form = r"(?:[\w.\- ]|\[[^\]]*\])+: (?:'[\w-]+' )?(?P<reason>.+); choices: (?P<names>.+)"
        match = re.fullmatch(form, message)
        if match is None:
            raise ValueError(
                "a refusal at build time reads \"where: 'name' reason; choices: a, b\", "
                f"this one: {message}"
            )
        names = tuple(name for name in match["names"].split(", ") if name != "None")
        return cls(match["reason"], names)


def families() -> list[str]:
    """Families of the registered models, in the order of registration."""
    return list(dict.fromkeys(entry.facts["family"] for entry in registry.model))


@functools.cache
def columns(family: str) -> tuple[Column, ...]:
    """The small models that stand for a family.

    Raises:
        ValueError: no small model is known.
    """
    if family in SMALL:
        return SMALL[family]
    for size in ("nano", "tiny"):
        if f"{family}-{size}" in registry.model:
            return (Column(preset=f"{family}-{size}", title=family),)
    raise ValueError(
        f"family {family!r} has no small model for the compatibility matrix: register a preset "
        f"'{family}-tiny' (width about 48, depth 2), or add an entry "
        f'"{family}": (Column(preset=..., title="{family}", changes=...),) to SMALL in '
        "effformer/testing/matrix.py"
    )


def slots(column: Column) -> dict[str, str]:
    """Slot -> kind of the parts that it takes."""
    config = registry.model.get(column.preset).preset
    return {f.name: f.metadata["kind"] for f in fields(config) if "kind" in f.metadata}


def names(kind: str) -> list[str]:
    """Every part of a kind. Cores stand for the attention around them."""
    if kind == "attention":
        return [name for name in list_attention() if name != "multihead"]
    return registry.KINDS[kind].names()


def build(column: Column, slot: str, name: str, options: Mapping[str, Any]) -> Any:
    """The model with a part in a slot."""
    spec = {"name": name, **options}
    return build_model(column.preset, **{**column.changes, slot: spec})


@functools.cache
def fit(preset: str, title: str, slot: str, name: str) -> Built | Refusal:
    """Try a part in a slot.

    Raises:
        ValueError: a refusal that names no choices, or another error than a refusal.
    """
    family = registry.model.get(preset).facts["family"]
    column = next(c for c in columns(family) if c.title == title)
    attempts: list[Mapping[str, Any]] = [{}]
    attempts += [WITH_OPTION[name]] if name in WITH_OPTION else []
    refusal = Refusal("", ())
    for options in attempts:
        try:
            build(column, slot, name, options)
        except CapabilityError as error:
            refusal = Refusal.parse(str(error))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{title}: {slot}={name!r} raises {type(error).__name__} when the model is built; "
                f"a part that cannot serve is refused by a CapabilityError: {error}"
            ) from error
        else:
            return Built(options)
    return refusal


def places(kind: str, name: str) -> dict[str, Built | Refusal]:
    """Every slot of every family that takes this kind, by "family.slot", and whether the part fits."""
    return {
        f"{column.title.replace(', ', ' ')}.{slot}": fit(column.preset, column.title, slot, name)
        for family in families()
        for column in columns(family)
        for slot, accepted in slots(column).items()
        if accepted == kind
    }


PARTNERS = {"attention": "block", "ffn": "block", "block": "attention"}
"""Kind -> the kind of those that stand around a part, or in it."""


def beside(kind: str, name: str) -> dict[str, Built | Refusal]:
    """Every partner of a part, by name, and whether a model can be built with both; each is tried in the
    families that take that partner, up to the first which takes both.
    """
    other = PARTNERS[kind]
    every = [column for family in families() for column in columns(family)]
    both = [c for c in every if {kind, other} <= {*slots(c).values()}]
    found: dict[str, Built | Refusal] = {}
    for partner in names(other):
        for column in both:
            mine, its = (_slot(column, k) for k in (kind, other))
            if isinstance(fit(column.preset, column.title, its, partner), Built):
                found[partner] = _together(column, {mine: name, its: partner})
                if isinstance(found[partner], Built):
                    break
    return found


def _slot(column: Column, kind: str) -> str:
    return next(slot for slot, accepted in slots(column).items() if accepted == kind)


def _together(column: Column, parts: Mapping[str, str]) -> Built | Refusal:
    options = {name: WITH_OPTION.get(name, {}) for name in parts.values()}
    specs = {slot: {"name": name, **options[name]} for slot, name in parts.items()}
    try:
        build_model(column.preset, **{**column.changes, **specs})
    except CapabilityError as error:
        return Refusal.parse(str(error))
    return Built(dict(item for each in options.values() for item in each.items()))
