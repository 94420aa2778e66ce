"""Stacks of blocks, with per-layer patterns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from torch import nn

from effformer.attention import Attention
from effformer.checks import unknown
from effformer.config import Config, part, resolve
from effformer.ffn import MLP
from effformer.site import Layer, Needs, Site
from effformer.values import Chance, Count, Depth

from .admission import check_layer, slot_needs
from .base import Block
from .prenorm import PreNorm
from .schedule import along_axes

__all__ = [
    "BackboneConfig",
    "StackConfig",
    "build_stack",
    "head_width",
    "layer_pattern",
    "resolve_layers",
    "with_causal",
]


_RATIO = r"([1-9]\d*):([1-9]\d*)(?:\s+(\S+))?"


def layer_pattern(given: Any) -> Any:
    """``layers`` in short, as the slices that it stands for: "3:1" is three blocks as they are, then
    one with softmax attention, and so on; "3:1 flow" takes another token mixer than softmax.

    Raises:
        ValueError: no such pattern.

    Example:
        >>> layer_pattern("3:1")
        {'3::4': {'attn': 'softmax'}}
    """
    if not isinstance(given, str):
        return given
    if (found := re.fullmatch(_RATIO, given.strip())) is None:
        raise ValueError(
            f"unknown pattern {given!r}; a ratio such as '3:1' (three blocks as they are, then one of "
            "softmax attention), one with the name of another token mixer, '3:1 flow', or a dict such "
            "as {'3::4': {'attn': 'softmax'}} works"
        )
    own, others = int(found[1]), int(found[2])
    mixer = found[3] or "softmax"
    return {f"{i}::{own + others}": {"attn": mixer} for i in range(own, own + others)}


@dataclass(frozen=True, slots=True, kw_only=True)
class StackConfig(Config):
    """What the blocks of a stack are made of.

    Attributes:
        attn: token mixer of every block.
        ffn: position-wise network of every block, None for none.
        block: arrangement of every block.
        width: which heads and channels of every block run, or None for all.
        tokens: on which tokens every block works, or None for all.
        layers: changes for some blocks, slice -> parts: ``{"0:4": {"attn": "softmax"}, "3::4":
            {...}, "-1": {...}}``; later entries win. In short "3:1", see `layer_pattern`.
        axes: axes of the grid along which the token mixer of each block acts, one letter a block,
            repeated to the depth: "t", "h", "w", "s" (space: all axes but t) or "f" (the full
            grid). Empty means the full grid everywhere. A block whose mixer already is an axis
            view keeps it.
        dropout: probability after each part.
        drop_path: stochastic depth of the last block.
        drop_path_rule: "linear": it grows from 0 at the first block; "uniform": all blocks have it.
    """

    attn: Config = part("attention", Attention.Config())
    ffn: Config | None = part("ffn", MLP.Config())
    block: Config = part("block", PreNorm.Config())
    width: Config | None = part("width", optional=True)
    tokens: Config | None = part("tokens", optional=True)
    layers: Mapping[str, Any] = field(default_factory=dict, metadata={"short": layer_pattern})
    axes: str = ""
    dropout: Chance = 0.0
    drop_path: Chance = 0.0
    drop_path_rule: Literal["linear", "uniform"] = "linear"

    def plain_layer(self, index: int) -> Layer:
        """The parts of block ``index`` before ``layers`` changes some; a model of two kinds of blocks
        says here which is where.
        """
        return Layer(
            attn=self.attn, ffn=self.ffn, block=self.block, width=self.width, tokens=self.tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneConfig(StackConfig):
    """Knobs shared by backbones that are a stack of equally wide blocks.

    Attributes:
        dim: width of the tokens.
        depth: number of blocks.
        heads: number of attention heads.
    """

    dim: Count
    depth: Depth
    heads: Count

    def at(self, path: str) -> Any:
        """The value at a dotted path, also of a block: ``config.at("blocks.3.ffn")``.

        Raises:
            ValueError: there is nothing at the path.
        """
        if not path.startswith("blocks."):
            return Config.at(self, path)
        key, slot, rest = _block_path(path)
        where = path if ":" not in key else f"{path}, one block"
        layers = resolve_layers(self, self.depth, name=type(self).__qualname__)
        chosen = layers[_slice(key, where)]
        if len(chosen) != 1 or slot not in {f.name for f in dataclasses.fields(Layer)}:
            raise ValueError(f"{path}: names no part of one of the {self.depth} blocks")
        part = getattr(chosen[0], slot)
        if rest and not isinstance(part, Config):
            raise ValueError(f"{path}: {slot!r} is {part!r}, which has no options of its own")
        return part if not rest else part.at(rest)

    def put(self, path: str, value: Any) -> Self:
        """A copy with another value at a dotted path, also of a block or of a slice of them:
        ``config.put("blocks.3.ffn", "swiglu")``, ``config.put("blocks.0:4.attn.eps", 1e-5)``.

        Raises:
            ValueError: there is nothing at the path, or the value does not fit.
            TypeError: a value of the wrong type.
        """
        if not path.startswith("blocks."):
            return Config.put(self, path, value)
        key, slot, rest = _block_path(path)
        layers = {k: dict(v) for k, v in self.layers.items()}
        present = resolve_layers(self, self.depth, name=type(self).__qualname__)
        chosen = range(self.depth)[_slice(key, path)]
        if not chosen or slot not in {f.name for f in dataclasses.fields(Layer)}:
            raise ValueError(f"{path}: names no part of one of the {self.depth} blocks")
        for i in chosen:
            part = value if not rest else self.at(f"blocks.{i}.{slot}").put(rest, value)
            # the last entry wins, so it holds what wins for this block today
            own = {name: getattr(present[i], name) for name in layers.pop(str(i), {})}
            layers[str(i)] = own | {slot: part}
        changed = self.replace(where=path, layers=layers)
        resolve_layers(changed, self.depth, name=path)
        return changed


def build_stack(
    config: StackConfig,
    site: Site | Sequence[Site],
    needs: Needs | Sequence[Needs],
    *,
    name: str,
    cross: Config | None = None,
    beside: Sequence[tuple[Needs, Site]] = (),
) -> nn.ModuleList:
    """Build the blocks of a model at paths ``blocks.0``, ``blocks.1``, ...

    Args:
        config: the model's config.
        site: facts shared by all ``config.depth`` blocks, or one site for each block (stages of
            different widths).
        needs: what the model asks of the parts, of those of each block if blocks differ.
        name: the model's name, for messages.
        cross: config of a further mixer in every block whose site has a memory, which attends to that
            (decoders), None for none.
        beside: what other stacks of the model ask of the same parts, and where; choices in messages
            serve them, too.

    Raises:
        CapabilityError: a part cannot do what the model needs; parts that can are named.
        ValueError: a bad slice or part in ``config.layers``.
    """
    if isinstance(site, Site):
        assert isinstance(config, BackboneConfig)
        site = [site] * config.depth
    each = [needs] * len(site) if isinstance(needs, Needs) else needs
    asked = list(zip(each, site, strict=True))
    crosses = [None if one.memory_dim is None else cross for one in site]
    plain = resolve_layers(config, len(site), cross=crosses, name=name)
    layers = plain
    if config.axes:
        views = along_axes([layer.attn for layer in plain], config.axes, site[0].axes, name)
        layers = [replace(layer, attn=view) for layer, view in zip(plain, views, strict=True)]
    for start, end in _runs(list(zip(layers, each, strict=True))):
        layer, (own, here) = layers[start], asked[start]
        others = [
            (n, s) for n, s in dict.fromkeys(asked) if (n, s.memory_dim) != (own, here.memory_dim)
        ]
        check_layer(
            layer, asked[start], f"{name} blocks[{start}:{end}]", (*others, *beside),
            scheduled=layer.attn is not plain[start].attn,
            bare=any(other.ffn is None for other in layers if other.block == layer.block),
        )  # fmt: skip
    blocks = nn.ModuleList()
    for i, (layer, (own, place)) in enumerate(zip(layers, asked, strict=True)):
        path = f"{place.path}.blocks.{i}" if place.path else f"blocks.{i}"
        share = i / max(len(layers) - 1, 1) if config.drop_path_rule == "linear" else 1.0
        here = replace(
            place, path=path, layer=i, depth=len(layers),
            dropout=config.dropout, drop_path=config.drop_path * share,
        )  # fmt: skip
        blocks.append(_build_block(layer, here, own))
    return blocks


def _build_block(layer: Layer, site: Site, needs: Needs) -> Block:
    parts: dict[str, Any] = {"attn": with_causal(layer.attn, needs.causal), "ffn": layer.ffn}
    if layer.cross is not None:
        parts["cross"] = layer.cross
    block: Block = layer.block.build(site, **parts)
    slots = {"width": layer.width, "tokens": layer.tokens}
    inside = slot_needs(layer, needs)
    filled = {k: c.entry.build.settled(c, inside) for k, c in slots.items() if c is not None}  # type: ignore[attr-defined]
    block.attach(**filled)
    return block


def head_width(config: BackboneConfig) -> int:
    """Width of the heads for which a model makes its rotary tables: that of its token mixer, or of
    the one that this puts into a view.
    """
    for attn in config.attn.nested("attention"):
        if (width := getattr(attn, "head_width", None)) is not None:
            return int(width(config.dim, config.heads))
    return config.dim // config.heads


def with_causal(attn: Config, causal: bool) -> Config:
    """The mixer in causal form if the model needs it."""
    if not causal or attn.caps().causal == "always":
        return attn
    if hasattr(attn, "causal"):
        return attn.replace(causal=True)
    inner = attn.parts("attention", "core")
    changes: dict[str, Any] = {name: with_causal(one, True) for name, one in inner.items()}
    return attn.replace(**changes)


def resolve_layers(
    config: StackConfig, depth: int, *, cross: Sequence[Config | None] = (), name: str
) -> list[Layer]:
    """The parts of every block: the config's, with the changes of ``config.layers``.

    Args:
        config: the model's config.
        depth: number of blocks.
        cross: mixer over a memory of every block, None for a block without; empty for none at all.
        name: the model's name, for messages.

    Raises:
        ValueError: a bad slice or part in ``config.layers``.
    """
    far = cross or [None] * depth
    layers = [replace(config.plain_layer(i), cross=far[i]) for i in range(depth)]
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
            layers[i] = replace(layers[i], **new)  # type: ignore[arg-type]  # None in optional slots
    return layers


def _resolve_part(slot: str, spec: Any, layer: Layer, where: str) -> Config | None:
    kinds = {
        "attn": "attention",
        "ffn": "ffn",
        "block": "block",
        "width": "width",
        "tokens": "tokens",
    }
    if layer.cross is not None:
        kinds["cross"] = "attention"
    if slot not in kinds:
        raise unknown("part", slot, list(kinds), where=where)
    if spec is None and slot in ("ffn", "width", "tokens"):
        return None
    return resolve(kinds[slot], spec, getattr(layer, slot), where=f"{where}.{slot}")


def _block_path(path: str) -> tuple[str, str, str]:
    """``blocks.3.ffn.ratio`` as the block, its part, and the path in there."""
    _, key, slot, rest = (*path.split(".", 3), "", "")[:4]
    return key, slot, rest


def _slice(key: str, where: str) -> slice:
    if not re.fullmatch(r"-?\d+|(-?\d+)?:(-?\d+)?(:(-?[1-9]\d*)?)?", key):
        raise ValueError(f"{where}: expected an index or a slice such as '0:4', '-1' or '3::4'")
    if ":" not in key:
        start = int(key)
        return slice(start, start + 1 or None)
    return slice(*(int(p) if p else None for p in key.split(":")))


def _runs(items: Sequence[object]) -> Iterator[tuple[int, int]]:
    """(start, end) of the runs of equal items."""
    start = 0
    for i in range(1, len(items) + 1):
        if i == len(items) or items[i] != items[start]:
            yield start, i
            start = i
