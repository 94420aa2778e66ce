"""Changes of a built model that its config does not tell, and how a saved model gets them back.

A verb that changes the structure in such a way (`quantize`) writes a record, a dict of JSON values
with its ``kind``, to ``model.transforms``. The registry `effformer.registry.transform` knows for
each kind the function ``(model, record) -> model`` that repeats the change on a model without
trained weights; `load_model` replays all records of a folder in their order, then loads the weights.
Verbs that edit the config (`acmize`) need no record.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from effformer.arguments import checked
from effformer.checks import FormatError, reason
from effformer.io import TRANSFORMS, load_weights, replay
from effformer.wrapped import unwrapping

__all__ = ["forget", "record", "replay", "restore"]

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


@checked
@unwrapping
def restore(model: M, path: str | Path) -> M:
    """A changed model of any library from the file that `effformer.save_weights` wrote of it.

    Models of ours know their config: `effformer.load_model` reads what ``save_pretrained`` wrote.

    Args:
        model: built as the saved one was before it was changed; its weights do not matter, and it
            stays as it is.
        path: the file, in our layout.

    Returns:
        A copy with the recorded changes and the weights of the file.

    Raises:
        FormatError: the file records no changes, or they or its weights do not fit the model.

    Example:
        >>> import effformer, tempfile, torch
        >>> from effformer.compress import quantize, restore
        >>> path = tempfile.mkdtemp() + "/small.safetensors"
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())
        >>> path = effformer.save_weights(quantize(net, "int8")[0], path)
        >>> type(restore(net, path)[0]).__name__
        'QuantLinear'
    """
    changed = copy.deepcopy(model)
    for change in _changes(Path(path)):
        changed = replay(changed, change)
    load_weights(changed, path, layout="effformer")
    return changed


def _changes(path: Path) -> list[dict[str, Any]]:
    """The records of a file of weights."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FormatError(f"restore: {path}: no readable safetensors file (no such file)")
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(TRANSFORMS, "[]"))
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(
            f"restore: {path}: no readable safetensors file ({reason(error)})"
        ) from error
    if not isinstance(found, list) or not all(isinstance(change, dict) for change in found):
        raise FormatError(f"restore: {path}: its records of changes are damaged")
    if not found:
        raise FormatError(
            f"restore: {path}: records no change of its model; load_weights loads such weights"
        )
    return found
