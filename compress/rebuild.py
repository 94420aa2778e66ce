"""Smaller models by their config: other widths, fewer blocks, parts of other sizes.

What depends on the width is found by building the model in other widths and comparing shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effformer.blocks import BackboneConfig
from effformer.blocks.stack import resolve_layers
from effformer.calls import bind, evaluating
from effformer.checks import CapabilityError
from effformer.nn.rope import GridRope

__all__ = [
    "check_width",
    "fewer_blocks",
    "narrowed",
    "rebuilt",
    "removable",
    "resized",
    "shortened",
    "simplified",
    "width_group",
]

_TURNED = 1e-3
"""How much of the largest output may change by adding channels in another order."""
_SLOTS = ("attn", "ffn", "block", "width", "tokens")


def rebuilt(model: Any, config: Any, state: Mapping[str, Any]) -> Any:
    """The model of another config with these tensors, or None if they are not those of it."""
    before = {name: p for name, p in model.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        fresh = type(model)(config, model.name)
    own = fresh.state_dict()
    if _shapes(own) != _shapes(state):
        return None
    fresh.to(next(model.parameters()))
    for name, tensor in (*fresh.named_parameters(), *fresh.named_buffers()):
        if isinstance(state.get(name), Tensor):
            tensor.data = tensor.data.to(state[name].dtype)
    fresh.load_state_dict(state)
    for name, parameter in fresh.named_parameters():
        if name in before:
            parameter.requires_grad_(before[name].requires_grad)
    fresh.trained = model.trained
    return fresh.train(model.training)


def _shapes(state: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in state.items() if isinstance(t, Tensor)}


def _on_meta(model: Any, config: Any) -> Any:
    """The model of another config; its shapes count."""
    with torch.device("meta"):
        return type(model)(config, model.name)


def simplified(config: Any) -> Any:
    """The same config, with parts that all blocks share written once."""
    layers = resolve_layers(config, config.depth, name=type(config).__qualname__)
    changes = {key: dict(value) for key, value in config.layers.items()}
    for slot in _SLOTS:
        if any(getattr(one, slot) != getattr(layers[0], slot) for one in layers):
            continue
        plain = config.replace(**{slot: getattr(layers[0], slot)})
        fewer = {k: {s: v for s, v in c.items() if s != slot} for k, c in changes.items()}
        if resolve_layers(plain.replace(layers=fewer), config.depth, name="") == layers:
            config, changes = plain, fewer
    return config.replace(layers={key: value for key, value in changes.items() if value})


def shortened(model: Any, config: Any) -> Any:
    """`simplified`, unless parts outside of the blocks, which follow the same slots, would change."""
    short = simplified(config)
    if short == config or _parts(_on_meta(model, short)) == _parts(_on_meta(model, config)):
        return short
    return config


def _parts(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a model is made of."""
    shapes = [(name, tensor.shape) for name, tensor in model.state_dict().items()]
    return [*((path, type(module)) for path, module in model.named_modules()), *shapes]


# -- width


def _pinned(config: Any) -> Any:
    """The config with every size that follows the width written out, so that it can change alone."""
    layers = resolve_layers(config, config.depth, name=type(config).__qualname__)
    for i, layer in enumerate(layers):
        attn: Any = layer.attn
        ffn: Any = layer.ffn
        if hasattr(attn, "head_width") and attn.head_dim is None:
            width = attn.head_width(config.dim, config.heads)
            config = config.put(f"blocks.{i}.attn.head_dim", width)
        if ffn is not None and getattr(ffn, "hidden", 0) is None:
            config = config.put(f"blocks.{i}.ffn.hidden", ffn.width(config.dim))
    return simplified(config)


def width_group(model: Any) -> Iterator[tuple[str, str, int, Tensor]]:
    """Module, name, axis and owner of every slice for the tensors that are as wide as the stream, or a
    whole number of times so: chunk c of an axis holds channel j at ``c * dim + j``.

    Raises:
        CapabilityError: the model was changed since it was built, its width cannot change alone, or a
            table of it is computed from the width.
    """
    dim = model.config.dim
    if getattr(model, "transforms", ()):
        raise CapabilityError("was changed before; cut the width first")
    step = next((s for s in (8, 16, 32, 64) if dim % s == 0), 2)
    try:
        config = _pinned(model.config)
        others = [_on_meta(model, config.replace(dim=dim + step * k)) for k in (1, 2)]
    except (ValueError, CapabilityError) as error:
        raise CapabilityError(f"the width cannot change alone: {error}") from error
    state = model.state_dict(keep_vars=True)
    shapes = [_shapes(other.state_dict()) for other in others]
    _check_tables(model, others[0], state)
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        if any(key not in s for s in shapes):
            raise CapabilityError(f"a model of another width has no {key}")
        for axis, size in enumerate(tensor.shape):
            one, two = (s[key][axis] for s in shapes)
            if one == size:
                continue
            times, rest = divmod(size, dim)
            if rest or one != times * (dim + step) or two != times * (dim + 2 * step):
                raise CapabilityError(f"{key} is not a whole number of times as wide as the stream")
            if not tensor.requires_grad:
                raise CapabilityError(
                    f"{key} is computed from the width (a learned one would do: positions='learned')"
                )
            module, _, name = key.rpartition(".")
            yield module, name, axis, torch.arange(dim).repeat(times)


def _check_tables(model: Any, other: nn.Module, state: Mapping[str, Any]) -> None:
    beside = {n: t.shape for n, t in model.named_buffers()}
    for name, buffer in other.named_buffers():
        if name not in state and beside.get(name) != buffer.shape:
            raise CapabilityError(f"{name} is computed from the width")


def check_width(model: Any) -> None:
    """Refuse models that know something of their channels beside their weights: with the channels of
    the stream in another order they would be other models.

    Raises:
        CapabilityError: the outputs change.
    """
    dim = model.config.dim
    order = torch.arange(dim).flip(0)
    state = _selected(model, order)
    moved = rebuilt(model, model.config, state)
    call = bind(model, None, where="prune")
    call = call.map(lambda x: x.to(next(model.parameters()).dtype) if x.is_floating_point() else x)
    with evaluating(model), evaluating(moved):
        for before, after in zip(call.run(model), call.run(moved), strict=True):
            if not before.numel():
                continue
            same = [before, before[..., order]] if before.shape[-1:] == (dim,) else [before]
            scale = float(before.abs().max())
            if not any(float((after - one).abs().max()) <= _TURNED * scale for one in same):
                raise CapabilityError("a table of the model is computed from the width")


def _selected(model: Any, kept: Tensor) -> dict[str, Any]:
    """The state with these channels of the stream."""
    state = dict(model.state_dict())
    for module, name, axis, owner in width_group(model):
        key = f"{module}.{name}" if module else name
        rows = torch.cat(
            [kept + c * model.config.dim for c in range(len(owner) // model.config.dim)]
        )
        state[key] = state[key].index_select(axis, rows.to(state[key].device))
    return state


def narrowed(model: Any, kept: Tensor) -> Any:
    """The model with some channels of its residual stream.

    Raises:
        CapabilityError: its width cannot change alone.
    """
    made = rebuilt(model, _pinned(model.config).replace(dim=len(kept)), _selected(model, kept))
    if made is None:
        raise CapabilityError(f"prune: the width of {model.name} cannot be {len(kept)}")
    return made


# -- depth


def _shorter(config: Any, kept: Sequence[int]) -> Any:
    """The config of some of the blocks."""
    name = type(config).__qualname__
    layers = resolve_layers(config, config.depth, name=name)
    axes = "".join(config.axes[i % len(config.axes)] for i in kept) if config.axes else ""
    fewer = config.replace(depth=len(kept), layers={}, axes=axes)
    plain = resolve_layers(fewer, len(kept), name=name)
    changes: dict[str, dict[str, Any]] = {}
    for now, before in enumerate(kept):
        differing = {
            slot: getattr(layers[before], slot)
            for slot in _SLOTS
            if getattr(layers[before], slot) != getattr(plain[now], slot)
        }
        if differing:
            changes[str(now)] = differing
    return simplified(fewer.replace(layers=changes))


def _renumbered(state: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    numbers = {before: now for now, before in enumerate(kept)}
    out = {}
    for key, value in state.items():
        found = re.match(r"blocks\.(\d+)\.", key)
        if found is None:
            out[key] = value
        elif int(found[1]) in numbers:
            out[f"blocks.{numbers[int(found[1])]}.{key[found.end() :]}"] = value
    return out


def removable(model: Any, block: int) -> bool:
    """Whether the others are what they are without this block."""
    if model.config.depth < 2:
        return False
    kept = [i for i in range(model.config.depth) if i != block]
    try:
        fewer = _on_meta(model, _shorter(model.config, kept))
    except (ValueError, CapabilityError):
        return False
    return _shapes(fewer.state_dict()) == _shapes(_renumbered(model.state_dict(), kept))


def fewer_blocks(model: Any, kept: Sequence[int]) -> Any:
    """The model with some of its blocks.

    Raises:
        CapabilityError: blocks that stay would have to be of another kind.
    """
    made = rebuilt(model, _shorter(model.config, kept), _renumbered(model.state_dict(), kept))
    if made is None:
        raise CapabilityError(
            f"prune: {model.name} with blocks {list(kept)} alone would have blocks of another kind"
        )
    return made


# -- sizes of parts


def resized(model: Any, sizes: Mapping[str, tuple[str, int, int]]) -> Any:
    """A model like one whose parts were cut, from a config that says so; None if the config cannot.

    Args:
        model: the cut model, with the config that it had before.
        sizes: path of a part -> the kind of its units, and how many there were and are.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(config, BackboneConfig) or model.transforms:
        return None
    wanted: dict[str, int] = {}
    try:
        for path, size in sizes.items():
            for option, value in _options(config, path, *size).items():
                if wanted.setdefault(option, value) != value:
                    return None  # parts that share their options lost unlike numbers of units
        # shared keys are checked against the heads: they go first, and come back last
        for option in wanted:
            if option.endswith(_SHARED):
                config = config.put(option, None)
        for option, value in wanted.items():
            config = config.put(option, value)
        made = rebuilt(model, simplified(config), model.state_dict())
    except (ValueError, TypeError, CapabilityError):
        return None
    return made if made is not None and _same_tables(model, made) else None


_SHARED = (".kv_heads", ".qk_heads")


def _options(config: Any, path: str, kind: str, before: int, after: int) -> dict[str, int]:
    """Options of the config that say how many units a part has, by their paths.

    Raises:
        ValueError: the part is in no block that the config tells of.
    """
    found = re.match(r"blocks\.(\d+)(\.|$)", path)
    if found is None:
        raise ValueError(path)
    here = f"blocks.{found[1]}"
    if kind == "channels":
        # a block may give its FFN a share of the width that the config says (Macaron's halves)
        whole = config.at(f"{here}.ffn").width(config.dim)
        return {f"{here}.ffn.hidden": round(whole * after / before)}
    if kind == "experts":
        return {f"{here}.ffn.experts": after}
    out = {f"{here}.attn.heads": after}
    for name in ("kv_heads", "qk_heads"):
        if (shared := config.at(f"{here}.attn.{name}")) is not None:
            out[f"{here}.attn.{name}"] = shared * after // before
    return out


def _same_tables(cut: nn.Module, made: nn.Module) -> bool:
    """Tables that no file keeps are the same, and none is for heads by their number."""
    own = dict(made.named_buffers())
    for name, table in cut.named_buffers():
        other = own.get(name)
        if other is None or other.shape != table.shape or not torch.equal(other, table):
            return False
    # rotary angles that were learned for each head stand in the model, which has more heads
    return not any(isinstance(m, GridRope) and hasattr(m, "freqs") for m in made.modules())
