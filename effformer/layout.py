"""Published key layouts: invertible maps between foreign state dicts and ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import FormatError

__all__ = ["TRAINING", "Layout", "Rows", "StateDict", "clashes", "has_keys", "renamed"]

StateDict = dict[str, Tensor]

TRAINING = (
    "dropout", "attn_dropout", "drop_path", "drop_path_rule", "layer_scale", "*.backend", "*.chunk",
)  # fmt: skip
"""Paths of options that leave the function of a trained model as it is; that there is a layer scale
is seen in the keys.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One published layout of a family.

    Attributes:
        name: for instance "official" or "diffusers".
        recognise: True if a set of keys has this layout; it gets the state dict, whose tensors may
            tell apart what keys cannot.
        to_ours: (foreign state dict, model config) -> our state dict.
        from_ours: (our state dict, model config) -> foreign state dict; it refuses a tensor that has
            no name there.
        strange: model config -> options of ours, by path, that the published network has not, with
            a few words each. Empty: it computes what the model computes.
        options: model config -> options of that network by their published names. A tuple lists the
            spellings of one value.
        around: beginnings of the keys of what stands around the network (heads of a training
            task); they are left out.
    """

    name: str
    recognise: Callable[[Iterable[str]], bool]
    to_ours: Callable[[StateDict, Any], StateDict]
    from_ours: Callable[[StateDict, Any], StateDict]
    strange: Callable[[Any], Mapping[str, str]] = lambda config: {}
    options: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    around: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rows:
    """Matrices cut differently: our pieces, stacked by rows, are their pieces, stacked by rows.

    Names are whole keys; ``{i}``, ``{j}`` stand for numbers and ``{kind}`` for "weight" or "bias".
    All pieces of one side are equally high, unless ``shares`` says otherwise.

    Attributes:
        ours: our keys from top to bottom.
        theirs: the foreign keys from top to bottom.
        shares: relative heights of our pieces.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    shares: tuple[int, ...] | None = None


def renamed(
    name: str,
    pairs: Iterable[tuple[str, str]],
    *,
    recognise: Callable[[Iterable[str]], bool],
    rows: Iterable[Rows] = (),
) -> Layout:
    """A layout that renames, and cuts some matrices differently: every key must match a pair by its
    beginning, or an entry of ``rows``.

    Args:
        name: name of the layout.
        pairs: (our prefix, foreign prefix); ``{i}``, ``{j}`` stand for numbers.
        recognise: see `Layout`.
        rows: matrices whose pieces differ.
    """
    table, cuts = list(pairs), list(rows)
    forward = [(_pattern(theirs), ours) for ours, theirs in table]
    backward = [(_pattern(ours), theirs) for ours, theirs in table]

    def to_ours(state: StateDict, config: Any) -> StateDict:
        made: StateDict = {}
        rest = dict(state)
        for cut in cuts:
            made |= _recut(rest, cut.theirs, cut.ours, cut.shares)
        return made | _rename(rest, forward)

    def from_ours(state: StateDict, config: Any) -> StateDict:
        made: StateDict = {}
        rest = dict(state)
        for cut in cuts:
            made |= _recut(rest, cut.ours, cut.theirs, None)
        for key in rest:
            if not any(pattern.match(key) for pattern, _ in backward):
                raise FormatError(f"layout {name!r} has no name for {key}")
        return made | _rename(rest, backward)

    return Layout(name=name, recognise=recognise, to_ours=to_ours, from_ours=from_ours)


def clashes(options: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """Options that a checkpoint states in another way: name -> a few words.

    Args:
        options: what the published network must be told to compute what a model of ours computes.
        facts: what the checkpoint says; what it does not say (or leaves None) cannot clash.
    """
    out = {}
    for name, wanted in options.items():
        said = facts.get(name)
        spellings = wanted if isinstance(wanted, tuple) else (wanted,)
        if said is not None and said not in spellings:
            out[name] = f"{name} is {said!r} there and {spellings[0]!r} here"
    return out


def has_keys(*wanted: str) -> Callable[[Iterable[str]], bool]:
    """A recogniser: all of these keys are present."""
    return lambda keys: set(wanted) <= set(keys)


_WILD = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "kind": r"(?P<kind>weight|bias)"}


def _escaped(name: str) -> str:
    name = re.escape(name)
    for wild, pattern in _WILD.items():
        name = name.replace(rf"\{{{wild}\}}", pattern)
    return name


def _pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(rf"{_escaped(prefix)}(?P<rest>\..+|$)")


def _recut(
    state: StateDict,
    source: tuple[str, ...],
    target: tuple[str, ...],
    shares: tuple[int, ...] | None,
) -> StateDict:
    """Take the pieces of ``source`` out of ``state``, stack them, and cut them into ``target``."""
    first = re.compile(_escaped(source[0]))
    made: StateDict = {}
    for match in filter(None, map(first.fullmatch, list(state))):
        groups = match.groupdict()
        keys = [name.format(**groups) for name in source]
        if not all(key in state for key in keys) or len({state[k].shape[1:] for k in keys}) > 1:
            continue  # reported as missing and unexpected by whoever loads it
        whole = torch.cat([state.pop(key) for key in keys])
        parts = shares or (1,) * len(target)
        heights = [whole.shape[0] * part // sum(parts) for part in parts]
        if sum(heights) != whole.shape[0]:  # cannot be cut; reported as a wrong shape
            heights = [whole.shape[0]] + [0] * (len(target) - 1)
        pieces = whole.split(heights)
        made |= {name.format(**groups): x for name, x in zip(target, pieces, strict=True)}
    return made


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
