"""Spellings of earlier versions: configs and weights that use one are read as what it became.

A retired part stands in `PARTS` with the slots that its options belong to now. A config in which it
is named, typed or saved, is rewritten before it is resolved, and one `RetiredWarning` says how.
Keys of saved weights and of records of changes are renamed where the model has them under the new
name only.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

__all__ = ["PARTS", "Retired", "RetiredWarning", "became", "read_changes", "rename"]


class RetiredWarning(UserWarning):
    """A config is written as an earlier version spelled it."""


@dataclass(frozen=True, slots=True)
class Retired:
    """What became of a part.

    Attributes:
        words: the present spelling, for people.
        slots: the slots that it fills beside its own.
        options: (its options, it was named) -> specs by slot; a change of options alone names
            nothing.
    """

    words: str
    slots: tuple[str, ...]
    options: Callable[[dict[str, Any], bool], dict[str, Any]]


def _dynamic(spec: Any, named: bool) -> Any:
    """The spec of a slot whose part was "dynamic" unless another was named."""
    return {"name": "dynamic", **spec} if named and isinstance(spec, Mapping) else spec


def _dydit(options: dict[str, Any], named: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        slot: options.pop(slot) for slot in ("width", "tokens") if slot in options
    }
    if named:
        found = dict[str, Any](width={}, tokens={}) | found
    block = {"block": {"name": "adaln-zero"} | options if named else options}
    return (block if named or options else {}) | {k: _dynamic(v, named) for k, v in found.items()}


_GATES = {"groups": "groups", "start": "bias", "tau": "tau", "threshold": "threshold"}


def _dynamic_mlp(options: dict[str, Any], named: bool) -> dict[str, Any]:
    gates = {new: options.pop(old) for old, new in _GATES.items() if old in options}
    if named:
        width = {"name": "dynamic", "over": "ffn"} | gates
        return {"ffn": {"name": "mlp"} | options, "width": width}
    return ({"ffn": options} if options else {}) | ({"width": gates} if gates else {})


PARTS: dict[tuple[str, str], Retired] = {
    ("block", "dydit"): Retired(
        "block='adaln-zero' with width='dynamic' and tokens='dynamic'",
        ("width", "tokens"),
        _dydit,
    ),
    ("ffn", "dynamic-mlp"): Retired(
        "ffn='mlp' with width={'name': 'dynamic', 'over': 'ffn'}", ("width",), _dynamic_mlp
    ),
}
"""(kind, name) of every part that is spelled otherwise now."""

_INSIDE = {"block": "body"}
"""Kind -> the option in which a part of this kind holds another one."""

_KEYS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(|.*\.)(ffn\d*)\.part\.gate\.(router\..+)"), r"\1width.gates.\2.\3"),
    (re.compile(r"(|.*\.)(ffn\d*)\.part\.mlp\.(.+)"), r"\1\2.part.\3"),
)
"""Key in weights of earlier versions -> key now."""


def became(kind: str, name: str) -> str:
    """In words what became of a name, empty if it is not retired."""
    part = PARTS.get((kind, name.lower()))
    return "" if part is None else f"{kind} {name!r} is written {part.words} now"


def read_changes(
    given: Mapping[str, Any], kinds: AbstractSet[str], present: Any, where: str
) -> Mapping[str, Any]:
    """Options of a config with retired parts in their present spelling, those in ``layers``
    included; one warning names all that were found.

    Args:
        given: option -> value, as typed or saved.
        kinds: slots of the config that hold parts.
        present: the config that the options change, None for a new one.
        where: begins the messages.

    Raises:
        ValueError: what a retired part became fills a slot that is given as well.
    """
    slots = _Slots(given, kinds, present, where)
    out = slots.rewritten(given)
    layers = given.get("layers")
    if isinstance(layers, Mapping):
        changed = {
            key: slots.rewritten(changes, layer=True) if isinstance(changes, Mapping) else changes
            for key, changes in layers.items()
        }
        out = {**out, "layers": changed}
    if not slots.words:
        return given
    warnings.warn(f"{where}: {'; '.join(slots.words)}; read as that", RetiredWarning, stacklevel=4)
    return out


class _Slots:
    """The retired parts of one config, and what they filled.

    Args:
        given: all options.
        kinds: slots of the config that hold parts.
        present: the config that the options change.
        where: begins the messages.
    """

    def __init__(
        self, given: Mapping[str, Any], kinds: AbstractSet[str], present: Any, where: str
    ) -> None:
        self.kinds, self.where = kinds, where
        self.whole = {s: given.get(s, getattr(present, s, None)) for s in ("width", "tokens")}
        self.past: dict[str, Retired] = {}
        self.words: list[str] = []

    def rewritten(self, given: Mapping[str, Any], *, layer: bool = False) -> dict[str, Any]:
        """Options of the config, or of one entry of its layers."""
        out, extra = dict(given), dict[str, Any]()
        for slot in ("block", "ffn"):
            if slot not in given or slot not in self.kinds:
                continue
            made = self._specs(slot, given[slot], {**(given if layer else self.whole), **extra})
            if made is None:
                continue
            del out[slot]
            out |= {slot: made.pop(slot)} if slot in made else {}
            extra |= made
        # what was given beside a retired part goes before what it became
        return out | {k: v for k, v in extra.items() if out.get(k) is None}

    def _specs(self, slot: str, spec: Any, beside: Mapping[str, Any]) -> dict[str, Any] | None:
        """Specs by slot in place of one, None if it stays as it is; ``beside`` stands there, too."""
        name = spec if isinstance(spec, str) else None
        options: dict[str, Any] = {}
        if isinstance(spec, Mapping):
            name = spec.get("name")
            options = {k: v for k, v in spec.items() if k != "name"}
        part = PARTS.get((slot, name.lower())) if isinstance(name, str) else None
        if part is not None and self.kinds >= {*part.slots}:
            self._check(slot, part, beside)
            self.past[slot] = part
            words = became(slot, name or "")
            self.words += [words] if words not in self.words else []
            return part.options(options, True)
        if (inside := _INSIDE.get(slot)) in options:
            made = self._specs(slot, options[inside], beside)
            if made is not None and slot in made:
                return made | {slot: {**spec, inside: made[slot]}}
            return made
        if slot not in self.past:
            return None
        if name is None and isinstance(spec, Mapping):
            return self.past[slot].options(options, False)
        # another part takes the place of the retired one, and what that brought along goes
        return {slot: spec} | {s: self.whole[s] for s in self.past[slot].slots}

    def _check(self, slot: str, part: Retired, beside: Mapping[str, Any]) -> None:
        """What was an FFN of its own never stood beside a width; the slots of a block did."""
        taken = [s for s in part.slots if slot == "ffn" and beside.get(s) is not None]
        if taken:
            raise ValueError(
                f"{self.where}.{slot}: is written {part.words} now, but {taken[0]}= is given as "
                "well; leave one of them out"
            )


def rename(keys: Iterable[str], own: Collection[str]) -> dict[str, str]:
    """Key of an earlier version -> key of a model, for those that the model has under the new name
    only.

    Args:
        keys: keys of saved weights, or paths of modules.
        own: those of the model.
    """
    out = {}
    for key in keys:
        for pattern, template in _KEYS:
            new = pattern.sub(template, key) if pattern.fullmatch(key) else key
            if new != key and key not in own and new in own:
                out[key] = new
    return out
