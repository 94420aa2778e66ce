"""Published key layouts: invertible maps between foreign state dicts and ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Layout", "StateDict", "has_keys", "renamed"]

StateDict = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One published layout of a family.

    Attributes:
        name: for instance "official" or "diffusers".
        recognise: True if a set of keys has this layout.
        to_ours: (foreign state dict, model config) -> our state dict.
        from_ours: (our state dict, model config) -> foreign state dict.
    """

    name: str
    recognise: Callable[[Iterable[str]], bool]
    to_ours: Callable[[StateDict, Any], StateDict]
    from_ours: Callable[[StateDict, Any], StateDict]


def renamed(
    name: str, pairs: Iterable[tuple[str, str]], *, recognise: Callable[[Iterable[str]], bool]
) -> Layout:
    """A layout that only renames: every key must match one pair by its beginning.

    Args:
        name: name of the layout.
        pairs: (our prefix, foreign prefix); ``{i}``, ``{j}`` stand for numbers.
        recognise: see `Layout`.
    """
    table = list(pairs)
    forward = [(_pattern(theirs), ours) for ours, theirs in table]
    backward = [(_pattern(ours), theirs) for ours, theirs in table]
    return Layout(
        name=name,
        recognise=recognise,
        to_ours=lambda state, config: _rename(state, forward),
        from_ours=lambda state, config: _rename(state, backward),
    )


def has_keys(*wanted: str) -> Callable[[Iterable[str]], bool]:
    """A recogniser: all of these keys are present."""
    return lambda keys: set(wanted) <= set(keys)


def _pattern(prefix: str) -> re.Pattern[str]:
    escaped = re.escape(prefix).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
    return re.compile(rf"{escaped}(?P<rest>\..+|$)")


def _rename(state: StateDict, table: list[tuple[re.Pattern[str], str]]) -> StateDict:
    out = {}
    for key, value in state.items():
        for pattern, target in table:
            if (match := pattern.match(key)) is not None:
                groups = match.groupdict()
                rest = groups.pop("rest")
                out[target.format(**groups) + rest] = value
                break
        else:
            out[key] = value  # reported as unexpected by whoever loads it
    return out
