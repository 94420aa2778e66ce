"""Which models of a family a published network is: options of ours that it has at any value, at some
values, or as they are by default. What is not named here must be as it is by default, so a new option
is refused until somebody says that a layout has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from effformer.blocks import resolve_layers
from effformer.config import Config
from effformer.layout import TRAINING

__all__ = ["ACTIVATIONS", "SIZES", "Choice", "Form", "same_table"]

SIZES = ("dim", "depth", "heads")

ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu-tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
    "quick-gelu": ("quick_gelu",),
}
"""Activation -> names in configs of transformers."""

Choice = Sequence[Any] | Callable[[Any], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The options that a published network has.

    Attributes:
        free: glob patterns of the paths of options that it has at any value.
        choices: path -> values that it has beside the default (of a part its names), or a function
            that says whether it has a value.
        layers: its blocks may differ from each other.
    """

    free: tuple[str, ...] = ()
    choices: Mapping[str, Choice] = field(default_factory=dict)
    layers: bool = False

    def strange(self, config: Any) -> dict[str, str]:
        """Path -> a few words, for every option of a config that the network has not."""
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        defaults = _defaults(type(config))
        layers = values.pop("layers", None)
        found = dict(self._walk(values, defaults, ""))
        if not layers:
            return found
        depth = config.depth if hasattr(config, "depth") else sum(config.depths)
        for i, layer in enumerate(resolve_layers(config, depth, name="layers")):
            parts = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}
            parts = {k: v for k, v in parts.items() if k in values and k != "cross"}
            if self.layers:
                found |= dict(self._walk(parts, defaults, ""))
            elif any(part != getattr(config.plain_layer(i), k) for k, part in parts.items()):
                found["layers"] = f"block {i} differs from others"
        return found

    def _walk(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any], above: str
    ) -> Iterator[tuple[str, str]]:
        for name, value in values.items():
            path, default = f"{above}{name}", defaults.get(name, dataclasses.MISSING)
            if any(fnmatchcase(path, pattern) for pattern in (*TRAINING, *self.free)):
                continue
            named = _named(value)
            allowed = self.choices.get(path, ())
            there = allowed(named) if callable(allowed) else named in (_named(default), *allowed)
            if not there:
                usual = "" if default is dataclasses.MISSING else f" ({_named(default)!r} there)"
                yield path, f"{path}={named!r}{usual}"
            elif isinstance(value, Config):
                inside = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
                same = type(value) is type(default)
                base = default if same else None
                yield from self._walk(inside, _defaults(type(value), base), f"{path}.")


def _named(value: Any) -> Any:
    """A value; of a part its name."""
    if not isinstance(value, Config):
        return value
    entry = type(value).ENTRY
    return type(value).__qualname__ if entry is None else entry.name


def _defaults(kind: type[Any], present: Any = None) -> dict[str, Any]:
    """Values of a config by field, those of its class where there is none."""
    fields = dataclasses.fields(kind)
    if present is not None:
        return {f.name: getattr(present, f.name) for f in fields}
    made = {f.name: f.default for f in fields}
    return made | {
        f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING
    }


def same_table(table: Tensor, expected: Tensor) -> bool:
    """A stored table is the expected one, perhaps rounded to half precision on its way."""
    if table.shape != expected.shape:
        return False
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return any(
        torch.allclose(table.float(), expected.to(kind).float(), rtol=0, atol=1e-4)
        for kind in kinds
    )
