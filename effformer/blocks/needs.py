"""What a model needs of the parts in its blocks, compared with what they can do before weights are
allocated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from effformer import registry
from effformer.attention import Attention, Axes
from effformer.checks import CapabilityError
from effformer.config import Config, resolve
from effformer.context import Site

from .iterate import Iterate

__all__ = ["Layer", "Needs", "check_layer", "part_name"]

MIXING = ("attention", "core")
_SLOTS = ("width", "tokens")
_NO_TIME = "reads the time embedding, which this model has not"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The parts of one block; ``scheduled``: its mixer was put into a view by a schedule of axes."""

    attn: Config
    ffn: Config | None
    block: Config
    cross: Config | None = None
    width: Config | None = None
    tokens: Config | None = None
    scheduled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a model asks of the parts in its blocks.

    Attributes:
        causal: tokens must not see later ones (False: the model attends both ways).
        mask: mask that the model passes, "none", "key" or "full".
        cond: the model has a conditioning vector.
        time: the model passes a time embedding.
        rope: the model passes rotary tables.
        grid: axes of the layout that the model passes, "thw" or its last letters; empty if it
            passes none.
        front: tokens without a place stand in front of the grid.
        cross: a mixer attends to a memory.
        memory: blocks have a further branch that attends to a memory.
        mixer_only: blocks have no position-wise network.
        shrinks: the model goes on with fewer tokens if a block returns fewer.
    """

    causal: bool = False
    mask: str = "none"
    cond: bool = False
    time: bool = False
    rope: bool = False
    grid: str = ""
    front: bool = False
    cross: bool = False
    memory: bool = False
    mixer_only: bool = False
    shrinks: bool = False


def part_name(config: Config) -> str:
    """The name that a user writes for a mixer: a multi-head attention has that of its core."""
    inner = [part_name(one) for one in config.parts(*MIXING).values()]
    if isinstance(config, Attention.Config):
        return inner[0]
    own = str(config.to_dict().get("name", type(config).__qualname__))
    return " of ".join([own, *inner])


def _is_causal(config: Config) -> bool:
    inner = config.parts(*MIXING).values()
    return bool(getattr(config, "causal", False)) or any(map(_is_causal, inner))


def check_layer(
    layer: Layer, needs: Needs, where: str, beside: Sequence[Needs], site: Site
) -> None:
    """Compare the parts of a block with what the model needs.

    Args:
        layer: the parts.
        needs: what the model asks of them.
        where: words that name the block, for messages.
        beside: what other stacks of the model ask of the same parts; choices serve them, too.
        site: the place of the block, for choices that can be built there.

    Raises:
        CapabilityError: a part cannot do it; parts that can are named.
    """
    place = f"{where}.block"
    while isinstance(layer.block, Iterate.Config):  # what it can do is up to its body
        layer, place = replace(layer, block=layer.block.body), f"{place}.body"
    found = {kind: getattr(layer, kind) or getattr(layer.block, kind, None) for kind in _SLOTS}
    slots = {kind: config for kind, config in found.items() if config is not None}
    every = (needs, *beside)
    own = replace(site, memory_dim=None)
    if isinstance(layer.attn, Axes.Config):
        _check_view(layer.attn, every, f"{where}.attn", slots, own, scheduled=layer.scheduled)
    else:
        _check_mixer(layer.attn, every, f"{where}.attn", slots, own)
    if layer.ffn is None:
        every = tuple(replace(n, mixer_only=True) for n in every)
    else:
        _check_ffn(layer.ffn, every, f"{where}.ffn", slots)
    if layer.cross is not None:
        far = Needs(mask=needs.mask, cross=True)
        _check_mixer(layer.cross, (far,), f"{where}.cross", slots, site)
    _check_block(layer, every, place, slots)
    for kind, config in slots.items():
        _check_slot(kind, config, layer, needs, where)


def _admitted(entry: registry.Entry, slots: Mapping[str, Config]) -> bool:
    """The parts in the slots of a block can work with this part, too."""
    if entry.kind == "block" and "tokens" in slots and not entry.caps.tokens:
        return False
    owners = (registry.KINDS[kind].owner(config) for kind, config in slots.items())
    return all(o is None or o.build.admits(entry.kind, entry.caps) for o in owners)  # type: ignore[attr-defined]


def _check_slot(kind: str, config: Config, layer: Layer, needs: Needs, where: str) -> None:
    """Parts in the slots "width" and "tokens"."""
    entry, holder = registry.KINDS[kind].owner(config), registry.block.owner(layer.block)
    assert entry is not None
    assert holder is not None
    if entry.caps.time and not needs.time:
        able = ", ".join(registry.KINDS[kind].names(time=False)) or "None"
        raise CapabilityError(f"{where}.{kind}: {entry.name!r} {_NO_TIME}; choices: {able}")
    if kind == "tokens" and not holder.caps.tokens:
        able = ", ".join(registry.block.names(tokens=True))
        state = holder.caps.causal == "always"
        why = "carry a state from token to token" if state else "run side by side"
        raise CapabilityError(
            f"{where}.tokens: {entry.name!r} acts between the branches of a block, but those of "
            f"{holder.name!r} {why} (block: {able} would do); choices: None"
        )
    entry.build.check(config, layer, needs, where)  # type: ignore[attr-defined]


def _check_block(
    layer: Layer, needs: Sequence[Needs], where: str, slots: Mapping[str, Config]
) -> None:
    entry, attn = registry.block.owner(layer.block), layer.attn
    assert entry is not None
    reason = _block_reason(entry.caps, attn, needs[0])
    if reason is None:
        return
    able = [
        e.name
        for e in registry.block
        if _admitted(e, slots) and all(not _block_reason(e.caps, attn, n) for n in needs)
    ]
    raise CapabilityError(f"{where}: {entry.name!r} {reason}; choices: {', '.join(sorted(able))}")


def _block_reason(caps: registry.Caps, attn: Config, needs: Needs) -> str | None:
    """Why a block does not serve, None if it does."""
    if caps.multihead and not isinstance(attn, Attention.Config):
        return f"needs queries, keys and values, which the token mixer {part_name(attn)!r} has not"
    if needs.memory and not caps.cross:
        return "has no attention to a memory"
    if needs.mixer_only and not caps.mixer_only:
        return "cannot do without an FFN"
    if caps.cond == "always" and not needs.cond:
        return "needs a conditioning vector, which this model has not"
    if caps.cond == "never" and needs.cond:
        return "cannot use this model's conditioning vector"
    return _NO_TIME if caps.time and not needs.time else _carry_reason(caps, needs)


def _check_ffn(
    config: Config, needs: Sequence[Needs], where: str, slots: Mapping[str, Config]
) -> None:
    entry = registry.ffn.owner(config)
    assert entry is not None
    reason = _ffn_reason(entry.caps, needs[0])
    if reason is None:
        return
    able = sorted(
        e.name
        for e in registry.ffn
        if _admitted(e, slots) and all(not _ffn_reason(e.caps, n) for n in needs)
    )
    raise CapabilityError(f"{where}: {entry.name!r} {reason}; choices: {', '.join(able)}")


def _ffn_reason(caps: registry.Caps, needs: Needs) -> str | None:
    """Why an FFN does not serve, None if it does: one over the grid mixes neighbours, later and
    masked ones included.
    """
    if caps.time and not needs.time:
        return _NO_TIME
    if not caps.grid:
        return _carry_reason(caps, needs)
    if (reason := _grid_reason(caps, needs)) is not None:
        return reason
    if needs.causal:
        return "mixes neighbours, but this model must not see later tokens"
    return None if needs.mask == "none" else f"cannot honour a {needs.mask} mask"


def _carry_reason(caps: registry.Caps, needs: Needs) -> str | None:
    """Why a block or an FFN that carries a state from token to token does not serve."""
    if caps.causal != "always":
        return None
    if not needs.causal:
        return "carries a state from token to token, but this model attends both ways"
    return None if needs.mask == "none" else f"cannot honour a {needs.mask} mask"


def _check_mixer(
    config: Config, needs: Sequence[Needs], where: str, slots: Mapping[str, Config], site: Site
) -> None:
    name = part_name(config)
    reason = _mixer_reason(config.caps(), needs[0])
    if reason is None and not needs[0].causal and _is_causal(config):
        reason = "has causal=True, but this model attends both ways"
    if reason is None:
        return
    entries = [entry for kind in (registry.attention, registry.core) for entry in kind]
    able = sorted(
        e.name
        for e in entries
        if _admitted(e, slots)
        and all(not _mixer_reason(e.caps, n) for n in needs)
        and _can_stand(e.name, site)
    )
    raise CapabilityError(f"{where}: {name!r} {reason}; choices: {', '.join(able)}")


def _check_view(
    view: Axes.Config, needs: Sequence[Needs], where: str, slots: Mapping[str, Config], site: Site,
    *, scheduled: bool,
) -> None:  # fmt: skip
    """A view needs its axes, and its mixer meets lines instead of the model's grid."""
    _check_mixer(Axes.Config(over=view.over), needs, where, slots, site)
    inside = [replace(n, grid=view.letters) for n in needs]
    place = where if scheduled else f"{where}.mixer"
    _check_mixer(view.mixer, inside, place, slots, view.place(site))


def _can_stand(name: str, site: Site) -> bool:
    """A mixer can be built there from its name alone; some ask for a number of tokens that can be
    cut, or that is fixed at all.
    """
    config = resolve("attention", name)
    entry = registry.attention.owner(config)
    assert entry is not None
    try:
        with torch.device("meta"):  # without weights
            entry.build(config, site)
    except ValueError:
        return False
    return True


def _mixer_reason(caps: registry.Caps, needs: Needs) -> str | None:
    """Why a token mixer does not serve, None if it does."""
    reasons: dict[str, tuple[Any, str]] = {
        "causal": (
            needs.causal,
            "is not causal, but this model must not see later tokens"
            if needs.causal
            else "needs causal order, but this model attends both ways",
        ),
        "mask": (needs.mask, f"cannot honour a {needs.mask} mask"),
    }
    if needs.rope:
        reasons["rope"] = (True, "cannot apply rotary embedding")
    if needs.cross:
        reasons["cross"] = (True, "cannot attend to a memory")
    for key, (value, reason) in reasons.items():
        if not caps.satisfies(**{key: value}):
            return reason
    return _grid_reason(caps, needs) if caps.grid else None


def _grid_reason(caps: registry.Caps, needs: Needs) -> str | None:
    """Why a part over the grid does not serve, None if it does."""
    if not needs.grid:
        return "needs a token grid, which this model has not"
    if not set(caps.grid) <= set(needs.grid):
        return (
            f"needs a token grid with axes {', '.join(caps.grid)}, and here it has "
            f"{', '.join(needs.grid)}"
        )
    if needs.front and not caps.front:
        return "has no place for tokens in front of the grid (class token, registers)"
    return None
