"""Put a layer in the place of another one: what people hung on the old layer stays, or the layer does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["carry", "hooked", "irreplaceable", "place", "standing_in", "swap", "tampered"]

_RUN = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_pre_hooks",
    "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip
"""Where torch keeps the hooks of a call."""

_STATE = (
    "_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
"""Where it keeps those of a state dict."""


def irreplaceable(layer: nn.Module) -> str | None:
    """Why another layer could not do what this linear layer or table does, None if one could."""
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm rewrites the table in every call"
    if layer._parameters.get("weight") is None:
        return "its weight is computed in every call"
    if layer._modules or layer._buffers or not layer._parameters.keys() <= {"weight", "bias"}:
        return "it holds more than a weight and a bias"
    return tampered(layer)


def tampered(layer: nn.Module) -> str | None:
    """What somebody did to a module of a known class that another one would undo, None if nothing."""
    if "forward" in vars(layer):
        return "it has a forward of its own"
    if any(getattr(layer, name) for name in _STATE):
        return "it has hooks of its state dict, which know the dense weight"
    return None


def hooked(layer: nn.Module) -> bool:
    """Hooks run when the layer is called."""
    return any(getattr(layer, name) for name in _RUN[:-1])


def carry(old: nn.Module, new: nn.Module) -> None:
    """Hand over hooks, the training mode and public attributes; handles of the hooks go on working."""
    for name in _RUN:
        setattr(new, name, getattr(old, name))
    new.training = old.training
    for name, value in vars(old).items():
        if not name.startswith("_") and not hasattr(new, name):
            setattr(new, name, value)


def swap(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Replace modules wherever they hang; a layer shared by two parents stays shared."""
    for old, layer in new.items():
        carry(old, layer)
    place(model, new)


def place(model: nn.Module, new: Mapping[Any, nn.Module]) -> list[tuple[dict[str, Any], str, Any]]:
    """Put modules in the places of others as they are; where, and what stood there."""
    places = [
        (parent._modules, key, child)
        for parent in (*model.modules(), *new.values())
        for key, child in parent._modules.items()  # named_children() hides repetitions
        if child in new
    ]
    for children, key, child in places:
        children[key] = new[child]
    return places


@contextmanager
def standing_in(model: nn.Module, new: Mapping[Any, nn.Module]) -> Iterator[None]:
    """Other modules in the places of some for the time of the block; then the very same stand there."""
    places = place(model, new)
    try:
        yield
    finally:
        for children, key, child in places:
            children[key] = child
