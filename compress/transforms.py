"""Changes of a built model that its config does not tell, and how a saved model gets them back.

A verb that changes the structure in such a way (`quantize`) writes a record, a dict of JSON values
with its ``kind``, to ``model.transforms``. The registry `effformer.registry.transform` knows for
each kind the function ``(model, record) -> model`` that repeats the change on a model without
trained weights; `load_model` replays all records of a folder in their order, then loads the weights.
Verbs that edit the config (`acmize`) need no record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from effformer.io import replay

__all__ = ["forget", "record", "replay"]

M = TypeVar("M", bound=nn.Module)


def record(model: nn.Module, kind: str, facts: Mapping[str, Any]) -> None:
    """Append a record to ``model.transforms``.

    Args:
        model: the changed model.
        kind: a name in `effformer.registry.transform`.
        facts: JSON values from which the change can be repeated.
    """
    added = {"kind": kind, **facts}
    model.transforms = (*getattr(model, "transforms", ()), added)  # type: ignore[assignment]


def forget(model: nn.Module, kind: str) -> None:
    """Drop the records of a kind, after its changes were undone."""
    records: tuple[dict[str, Any], ...] = getattr(model, "transforms", ())
    model.transforms = tuple(r for r in records if r["kind"] != kind)  # type: ignore[assignment]
