"""What a model needs of the parts in its blocks, compared with what they can do before weights are
allocated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from effformer import registry
from effformer.attention import View
from effformer.attention.multihead import steady
from effformer.checks import CapabilityError
from effformer.config import Config, resolve
from effformer.registry import Caps
from effformer.site import Layer, Needs, Site

__all__ = ["check_cross", "check_layer", "slot_needs"]

Asked = tuple[Needs, Site]
"""What a model asks of a part, and where."""

_SLOTS = ("width", "tokens")
_NO_TIME = "reads the time embedding, which this model has not"


def check_layer(
    layer: Layer, asked: Asked, where: str, beside: Sequence[Asked], *, scheduled: bool = False,
    bare: bool = False,
) -> None:  # fmt: skip
    """Compare the parts of a block with what the model needs.

    Args:
        layer: the parts.
        asked: what the model asks of them, and where the block stands.
        where: words that name the block, for messages.
        beside: what other blocks and stacks of the model ask of the same parts; choices serve them, too.
        scheduled: the mixer was put into a view by a schedule of axes.
        bare: a block of this arrangement has no FFN.

    Raises:
        CapabilityError: a part cannot do it; parts that can are named.
    """
    found = {kind: getattr(layer, kind) for kind in _SLOTS}
    slots = {kind: config for kind, config in found.items() if config is not None}
    needs, site = asked
    every = (asked, *beside)
    near = [(n, replace(s, memory_dim=None) if s.memories else s) for n, s in every]
    _check_mixer(layer.attn, near, f"{where}.attn", slots, scheduled=scheduled)
    if layer.ffn is not None:
        _check_part(layer.ffn, every, f"{where}.ffn", slots, _ffn_reason)
    if layer.cross is not None:
        check_cross(layer.cross, asked, f"{where}.cross", slots, one_by_one=needs.causal)

    def block_reason(caps: Caps, needs: Needs, site: Site) -> str | None:
        return _block_reason(caps, replace(layer, ffn=None) if bare else layer, needs, site)

    # a block of one stream never serves two: models of both kinds have a slot for each
    alike = [one for one in every if one[0].joint == needs.joint]
    _check_part(layer.block, alike, f"{where}.block", slots, block_reason)
    for kind, config in slots.items():
        _check_slot(kind, config, layer, (slot_needs(layer, needs), site), where)


def check_cross(
    config: Config,
    asked: Asked,
    where: str,
    slots: Mapping[str, Config] | None = None,
    *,
    one_by_one: bool,
) -> None:
    """Compare a mixer over memories with what the model needs; these have no grid.

    Args:
        config: the mixer.
        asked: what the model asks of it, and where it stands.
        where: words that name it, for messages.
        slots: parts in the slots of its block.
        one_by_one: queries must not influence each other.

    Raises:
        CapabilityError: it cannot do that; mixers that can are named.
    """
    needs, site = asked
    far = [(Needs(mask=needs.mask), replace(site, grid=None, memory_dim=w)) for w in site.memories]
    _check_mixer(config, far, where, slots or {}, one_by_one=one_by_one)


def slot_needs(layer: Layer, needs: Needs) -> Needs:
    """What a model asks of parts in slots; a block in another one must return all of its tokens."""
    return replace(needs, shrinks=needs.shrinks and not layer.block.parts("block"))


def _admitted(entry: registry.Entry, slots: Mapping[str, Config]) -> bool:
    """The parts in the slots of a block can work with this part, too."""
    if entry.kind == "block" and "tokens" in slots and not entry.caps.sequential:
        return False
    return all(c.entry.build.admits(c, entry.kind, entry.caps) for c in slots.values())  # type: ignore[attr-defined]


def _check_part(
    config: Config,
    asked: Sequence[Asked],
    where: str,
    slots: Mapping[str, Config],
    reason_of: Callable[[Caps, Needs, Site], str | None],
) -> None:
    """Refuse a part for the first reason, and name those of its kind that have none."""
    while inner := config.parts("block"):  # what a block around another one can do is up to that
        (name, config), *_ = inner.items()
        where = f"{where}.{name}"
    reason = reason_of(config.caps(), *asked[0])
    if reason is None:
        return
    able = sorted(
        e.name
        for e in registry.KINDS[config.entry.kind]
        if _admitted(e, slots) and not any(reason_of(e.caps, *one) for one in asked)
    )
    raise CapabilityError(
        f"{where}: {config.entry.name!r} {reason}; choices: {', '.join(able) or 'None'}"
    )


def _check_slot(kind: str, config: Config, layer: Layer, asked: Asked, where: str) -> None:
    """Parts in the slots "width" and "tokens"."""
    (needs, site), entry, caps = asked, config.entry, layer.block.caps()
    if entry.caps.time and site.time_dim is None:
        able = ", ".join(registry.KINDS[kind].names(time=False)) or "None"
        raise CapabilityError(f"{where}.{kind}: {entry.name!r} {_NO_TIME}; choices: {able}")
    if kind == "tokens" and len(site.memories) > 1:
        raise CapabilityError(
            f"{where}.tokens: {entry.name!r} acts between the branches of a block, but those over "
            f"{len(site.memories)} memories run side by side (one memory would do); choices: None"
        )
    if kind == "tokens" and not caps.sequential:
        able = ", ".join(registry.block.names(sequential=True))
        why = "carry a state from token to token" if caps.causal == "always" else "run side by side"
        raise CapabilityError(
            f"{where}.tokens: {entry.name!r} acts between the branches of a block, but those of "
            f"{layer.block.entry.name!r} {why} (block: {able} would do); choices: None"
        )
    entry.build.check(config, layer, needs, where)  # type: ignore[attr-defined]


def _block_reason(caps: Caps, layer: Layer, needs: Needs, site: Site) -> str | None:
    """Why a block does not serve, None if it does."""
    if caps.multihead and not layer.attn.caps().multihead:
        return f"needs queries, keys and values, which the token mixer {layer.attn.title!r} has not"
    if site.memory_dim is not None and not caps.cross:
        return "has no attention to a memory"
    if layer.ffn is None and not caps.mixer_only:
        return "cannot do without an FFN"
    if needs.joint != caps.joint:
        return "has one stream" if needs.joint else "has two streams, and this model one"
    if needs.joint and layer.block.parts("block"):
        return "has two streams, and the block around it one"
    if caps.cond == "always" and site.cond_dim is None:
        return "needs a conditioning vector, which this model has not"
    if caps.cond == "never" and site.cond_dim is not None:
        return "cannot use this model's conditioning vector"
    return _NO_TIME if caps.time and site.time_dim is None else _carry_reason(caps, needs)


def _ffn_reason(caps: Caps, needs: Needs, site: Site) -> str | None:
    """Why an FFN does not serve, None if it does: one over the grid mixes neighbours, later and
    masked ones included.
    """
    if caps.time and site.time_dim is None:
        return _NO_TIME
    if not caps.axes:
        return _carry_reason(caps, needs)
    if (reason := _grid_reason(caps, needs, site)) is not None:
        return reason
    if needs.causal:
        return "mixes neighbours, but this model must not see later tokens"
    return None if needs.mask == "none" else f"cannot honour a {needs.mask} mask"


def _carry_reason(caps: Caps, needs: Needs) -> str | None:
    """Why a block or an FFN that carries a state from token to token does not serve."""
    if caps.causal != "always":
        return None
    if not needs.causal:
        return "carries a state from token to token, but this model attends both ways"
    return None if needs.mask == "none" else f"cannot honour a {needs.mask} mask"


def _check_mixer(
    config: Config, asked: Sequence[Asked], where: str, slots: Mapping[str, Config],
    *, scheduled: bool = False, one_by_one: bool = False,
) -> None:  # fmt: skip
    """A mixer, and the one that it puts into a view: that one meets lines instead of the grid.
    ``one_by_one``: queries must not influence each other.
    """
    needs, site = asked[0]
    if isinstance(config, View):
        alone = replace(config.entry.caps, axes=config.caps().axes)
        if _mixer_reason(alone, needs, site) is None:
            inner, _ = config.within(site)
            inside = [(n, config.within(s)[1]) for n, s in asked]
            return _check_mixer(inner, inside, where if scheduled else f"{where}.mixer", slots)
    reason = _mixer_reason(config.caps(), needs, site)
    if reason is None and not needs.causal and _is_causal(config):
        reason = "has causal=True, but this model attends both ways"
    if reason is not None and needs.joint and _convolves(config):
        reason = "convolves neighbours, and two streams are none (short_conv=0 would do)"
    if reason is None:
        reason = _rope_reason(config, needs, site)
    if reason is None and one_by_one and config.title not in steady():
        reason = "lets queries compete for the memory, but here they must not see each other"
    if reason is None:
        return None
    able = sorted(
        e.name
        for e in registry.attention
        if _admitted(e, slots)
        and not any(_mixer_reason(e.caps, *one) for one in asked)
        and _can_stand(resolve("attention", e.name), site, needs)
        and (not one_by_one or e.name in steady())
    )
    raise CapabilityError(f"{where}: {config.title!r} {reason}; choices: {', '.join(able)}")


def _convolves(config: Config) -> bool:
    """The heads look at neighbours, where the core alone would not."""
    cores = config.parts("core").values()
    return bool(getattr(config, "short_conv", 0)) and all(c.caps().order_free for c in cores)


def _is_causal(config: Config) -> bool:
    return any(getattr(one, "causal", False) for one in config.nested("attention", "core"))


def _rope_reason(config: Config, needs: Needs, site: Site) -> str | None:
    """Why heads do not fit the model's rotary tables, None if they do."""
    head_width = getattr(config, "head_width", None)
    if needs.rope is None or head_width is None:
        return None
    width = head_width(site.dim, site.heads)
    if width == needs.rope:
        return None
    return (
        f"has heads of width {width}, but this model's rotary tables are made for {needs.rope} "
        f"(head_dim={needs.rope} would do, or the same head_dim in attn=)"
    )


@functools.lru_cache(maxsize=1024)
def _can_stand(config: Config, site: Site, needs: Needs) -> bool:
    """A mixer can be built there from its name alone; some ask for a number of tokens that can be
    cut, or that is fixed at all.
    """
    if needs.rope is not None and config.caps().multihead:
        config = config.replace(head_dim=needs.rope)  # a name alone keeps the heads of the model
    if _rope_reason(config, needs, site) is not None:
        return False
    try:
        with torch.device("meta"):  # without weights
            config.build(site)
    except ValueError:
        return False
    return True


def _mixer_reason(caps: Caps, needs: Needs, site: Site) -> str | None:
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
    if needs.rope is not None:
        reasons["rope"] = (True, "cannot apply rotary embedding")
    if site.memory_dim is not None:
        reasons["cross"] = (True, "cannot attend to a memory")
    if needs.joint:
        if caps.causal == "never":  # else it reads a row: the tokens of one stream, then the others
            reasons["order_free"] = (
                True,
                "depends on the places of the tokens, and two streams share none",
            )
        reasons["multihead"] = (
            True,
            "has no queries, keys and values that two streams could share",
        )
    for key, (value, reason) in reasons.items():
        if not caps.satisfies(**{key: value}):
            return reason
    return _grid_reason(caps, needs, site) if caps.axes else None


def _grid_reason(caps: Caps, needs: Needs, site: Site) -> str | None:
    """Why a part over the grid does not serve, None if it does."""
    if not site.axes:
        return "needs a token grid, which this model has not"
    if not set(caps.axes) <= set(site.axes):
        return (
            f"needs a token grid with axes {', '.join(caps.axes)}, and here it has "
            f"{', '.join(site.axes)}"
        )
    if needs.front and not caps.front:
        return "has no place for tokens in front of the grid (class token, registers)"
    return None
