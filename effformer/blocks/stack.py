"""Stacks of blocks: per-layer patterns and the check of capabilities before weights are
allocated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from effformer import registry
from effformer.attention import Attention
from effformer.checks import CapabilityError, unknown
from effformer.config import Config, part, resolve
from effformer.context import Site
from effformer.ffn import MLP

from .base import Block
from .prenorm import PreNorm

__all__ = ["BackboneConfig", "Layer", "Needs", "StackConfig", "build_stack"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StackConfig(Config):
    """What the blocks of a stack are made of.

    Attributes:
        attn: token mixer of every block.
        ffn: position-wise network of every block.
        block: arrangement of every block.
        layers: changes for some blocks, slice -> parts: ``{"0:4": {"attn": "softmax"}, "3::4":
            {...}, "-1": {...}}``; later entries win.
        dropout: probability after each part.
        drop_path: stochastic depth of the last block, growing linearly from 0.
    """

    attn: Config = part("attention", Attention.Config())
    ffn: Config = part("ffn", MLP.Config())
    block: Config = part("block", PreNorm.Config())
    layers: Mapping[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneConfig(StackConfig):
    """Knobs shared by backbones that are a stack of equally wide blocks.

    Attributes:
        dim: width of the tokens.
        depth: number of blocks.
        heads: number of attention heads.
    """

    dim: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        StackConfig.__post_init__(self)
        for name in ("dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The parts of one block."""

    attn: Config
    ffn: Config
    block: Config
    cross: Config | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a model asks of the parts in its blocks.

    Attributes:
        causal: tokens must not see later ones (False: the model attends both ways).
        mask: mask that the model passes, "none", "key" or "full".
        cond: the model has a conditioning vector.
        rope: the model passes rotary tables.
        grid: the model passes the layout of its tokens.
        front: tokens without a place stand in front of the grid.
        cross: a mixer attends to a memory.
        memory: blocks have a further branch that attends to a memory.
    """

    causal: bool = False
    mask: str = "none"
    cond: bool = False
    rope: bool = False
    grid: bool = False
    front: bool = False
    cross: bool = False
    memory: bool = False


def build_stack(
    config: StackConfig,
    site: Site | Sequence[Site],
    needs: Needs,
    *,
    name: str,
    cross: Config | None = None,
    beside: Sequence[Needs] = (),
) -> nn.ModuleList:
    """Build the blocks of a model at paths ``blocks.0``, ``blocks.1``, ...

    Args:
        config: the model's config.
        site: facts shared by all ``config.depth`` blocks, or one site for each block (stages of
            different widths).
        needs: what the model asks of the parts.
        name: the model's name, for messages.
        cross: config of a further mixer in every block that attends to a memory of width
            ``site.memory_dim`` (decoders), None for none.
        beside: what other stacks of the model ask of the same parts; choices in messages serve
            them, too.

    Raises:
        CapabilityError: a part cannot do what the model needs; parts that can are named.
        ValueError: a bad slice or part in ``config.layers``.
    """
    if isinstance(site, Site):
        assert isinstance(config, BackboneConfig)
        site = [site] * config.depth
    needs = replace(needs, memory=cross is not None)
    layers = _layers(config, len(site), cross, name)
    for where, layer in _runs(layers, name):
        _check_layer(layer, needs, where, beside)
    blocks = nn.ModuleList()
    for i, (layer, place) in enumerate(zip(layers, site, strict=True)):
        path = f"{place.path}.blocks.{i}" if place.path else f"blocks.{i}"
        rate = config.drop_path * i / max(len(layers) - 1, 1)
        here = replace(place, path=path, layer=i, dropout=config.dropout, drop_path=rate)
        blocks.append(_build_block(layer, here, needs))
    return blocks


def _build_block(layer: Layer, site: Site, needs: Needs) -> Block:
    entry = registry.block.owner(layer.block)
    assert entry is not None
    parts = {"attn": with_causal(layer.attn, needs.causal), "ffn": layer.ffn}
    if layer.cross is not None:
        parts["cross"] = layer.cross
    block: Block = entry.build(layer.block, site, **parts)
    return block


def with_causal(attn: Config, causal: bool) -> Config:
    """The mixer in causal form if the model needs it."""
    if not causal or _caps(attn).causal == "always":
        return attn
    if isinstance(attn, Attention.Config):
        return attn.replace(core={"causal": True})
    return attn.replace(causal=True)


def _layers(config: StackConfig, depth: int, cross: Config | None, name: str) -> list[Layer]:
    layer = Layer(attn=config.attn, ffn=config.ffn, block=config.block, cross=cross)
    layers = [layer] * depth
    for key, changes in config.layers.items():
        where = f"{name} layers[{key!r}]"
        chosen = range(depth)[_slice(key, where)]
        if not chosen:
            raise ValueError(f"{where}: selects none of the {depth} blocks")
        if not isinstance(changes, Mapping):
            raise TypeError(
                f"{where}: expected a dict such as {{'attn': 'softmax'}}, got {changes!r}"
            )
        for i in chosen:
            new = {k: _resolve_part(k, v, layers[i], where) for k, v in changes.items()}
            layers[i] = replace(layers[i], **new)
    return layers


def _resolve_part(slot: str, spec: Any, layer: Layer, where: str) -> Config:
    kinds = {"attn": "attention", "ffn": "ffn", "block": "block"}
    if layer.cross is not None:
        kinds["cross"] = "attention"
    if slot not in kinds:
        raise unknown("part", slot, list(kinds), where=where)
    return resolve(kinds[slot], spec, getattr(layer, slot), where=f"{where}.{slot}")


def _slice(key: str, where: str) -> slice:
    if not re.fullmatch(r"-?\d+|(-?\d+)?:(-?\d+)?(:(-?[1-9]\d*)?)?", key):
        raise ValueError(f"{where}: expected an index or a slice such as '0:4', '-1' or '3::4'")
    if ":" not in key:
        start = int(key)
        return slice(start, start + 1 or None)
    return slice(*(int(p) if p else None for p in key.split(":")))


def _runs(layers: list[Layer], name: str) -> Iterator[tuple[str, Layer]]:
    """Runs of equal layers with the words that name them."""
    start = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[start]:
            yield f"{name} blocks[{start}:{i}]", layers[start]
            start = i


def _caps(config: Config) -> registry.Caps:
    if isinstance(config, Attention.Config):
        entry = registry.core.owner(config.core)
    else:
        entry = registry.attention.owner(config)
    assert entry is not None, type(config)
    return entry.caps


def _part_name(config: Config) -> str:
    inner = config.core if isinstance(config, Attention.Config) else config
    return str(inner.to_dict().get("name", type(inner).__qualname__))


def _check_layer(layer: Layer, needs: Needs, where: str, beside: Sequence[Needs]) -> None:
    every = (needs, *beside)
    _check_mixer(layer.attn, every, f"{where}.attn")
    _check_ffn(layer.ffn, every, f"{where}.ffn")
    if layer.cross is not None:
        _check_mixer(layer.cross, (Needs(mask=needs.mask, cross=True),), f"{where}.cross")
    _check_block(layer.block, every, f"{where}.block")


def _check_block(config: Config, needs: Sequence[Needs], where: str) -> None:
    entry = registry.block.owner(config)
    assert entry is not None
    reason = _block_reason(entry.caps, needs[0])
    if reason is None:
        return
    able = [e.name for e in registry.block if all(not _block_reason(e.caps, n) for n in needs)]
    raise CapabilityError(f"{where}: {entry.name!r} {reason}; choices: {', '.join(sorted(able))}")


def _block_reason(caps: registry.Caps, needs: Needs) -> str | None:
    """Why a block does not serve, None if it does."""
    if needs.memory and not caps.cross:
        return "has no attention to a memory"
    if caps.cond == "always" and not needs.cond:
        return "needs a conditioning vector, which this model has not"
    if caps.cond == "never" and needs.cond:
        return "cannot use this model's conditioning vector"
    return None


def _check_ffn(config: Config, needs: Sequence[Needs], where: str) -> None:
    entry = registry.ffn.owner(config)
    assert entry is not None
    reason = _ffn_reason(entry.caps, needs[0])
    if reason is None:
        return
    able = sorted(e.name for e in registry.ffn if all(not _ffn_reason(e.caps, n) for n in needs))
    raise CapabilityError(f"{where}: {entry.name!r} {reason}; choices: {', '.join(able)}")


def _ffn_reason(caps: registry.Caps, needs: Needs) -> str | None:
    """Why an FFN does not serve: one over the grid mixes neighbours, later and masked ones
    included.
    """
    if not caps.grid:
        return None
    if (reason := _grid_reason(caps, needs)) is not None:
        return reason
    if needs.causal:
        return "mixes neighbours, but this model must not see later tokens"
    return None if needs.mask == "none" else f"cannot honour a {needs.mask} mask"


def _check_mixer(config: Config, needs: Sequence[Needs], where: str) -> None:
    name = _part_name(config)
    inner: Any = config.core if isinstance(config, Attention.Config) else config
    reason = _mixer_reason(_caps(config), needs[0])
    if reason is None and not needs[0].causal and getattr(inner, "causal", False):
        reason = "has causal=True, but this model attends both ways"
    if reason is None:
        return
    entries = [entry for kind in (registry.attention, registry.core) for entry in kind]
    able = sorted(e.name for e in entries if all(not _mixer_reason(e.caps, n) for n in needs))
    raise CapabilityError(f"{where}: {name!r} {reason}; choices: {', '.join(able)}")


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
    if needs.front and not caps.front:
        return "has no place for tokens in front of the grid (class token, registers)"
    return None
