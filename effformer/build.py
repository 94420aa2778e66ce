"""From a name to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import registry
from .arguments import checked

if TYPE_CHECKING:
    from effformer.models.base import Model

__all__ = ["build_model", "list_attention", "list_blocks", "list_ffn", "list_models"]


@checked
def build_model(name: str, **overrides: Any) -> Model:
    """Build a model by name; nothing but names is resolved here.

    Args:
        name: a registered model, for instance ``"dit-b"`` or ``"DiT-B/2"``; `list_models` lists
            them.
        **overrides: fields of the model's config. Parts are names, dicts or configs:
        ``attn="flow"``,
            ``attn={"name": "flow", "eps": 1e-6}``, ``layers={"0:4": {"attn": "softmax"}}``.

    Returns:
        The model, randomly initialised; ``model.config`` rebuilds it exactly.

    Raises:
        ValueError: unknown model, part or option; the nearest name is suggested.
        TypeError: a value of the wrong type.
        CapabilityError: a part cannot do what the model needs; parts that can are named.

    Example:
        >>> model = build_model("dit-tiny", attn="flow", depth=2)
        >>> model.config.depth
        2
    """
    entry = registry.model.get(name)
    config = entry.preset.changed(overrides, where=entry.name)
    model: Model = entry.build(config, name=entry.name)
    model.remember_drawn()
    return model


@checked
def list_models(like: str = "*") -> list[str]:
    """Names of models that match a glob, for instance ``list_models("dit*")``."""
    return registry.model.names(like)


@checked
def list_attention(like: str = "*", **caps: object) -> list[str]:
    """Names accepted by ``attn=``, filtered by capability
    (``causal=True``).
    """
    return registry.attention.names(like, **caps)


@checked
def list_ffn(like: str = "*", **caps: object) -> list[str]:
    """Names accepted by ``ffn=``."""
    return registry.ffn.names(like, **caps)


@checked
def list_blocks(like: str = "*", **caps: object) -> list[str]:
    """Names accepted by ``block=``."""
    return registry.block.names(like, **caps)
