"""Loading weights into a model: all of them or none, and only those of a model that computes the same.

Keys and shapes do not tell everything: how many heads there are, where positions start, what stands
before a norm. What a checkpoint says about its model is compared with the model at hand, and a layout
says which models it holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import registry, retired
from .arguments import checked
from .checks import FormatError, unknown
from .layout import TRAINING, Layout, StateDict, clashes
from .notebook import Shown
from .weights import WeightFile, open_weights
from .wrapped import unwrapping

__all__ = [
    "LoadReport",
    "Matched",
    "by_name",
    "fill",
    "load_weights",
    "matched",
    "model_name",
    "tell_not_finite",
    "tensors_of",
    "unlike",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport(Shown):
    """What `load_weights` did.

    Attributes:
        layout: name of the layout that was recognised.
        weights: the entry of the file that was read, such as "state_dict_ema"; "" for the whole
            file.
        averaged: that entry is an average over training.
        missing: our keys that the file does not have.
        unexpected: keys of the file that the model does not have.
        ignored: keys of the file that belong to what stands around the model.
        kept: our keys that stayed as they were, as asked.
        reshaped: our keys whose tensors were viewed into another shape of equal size.
        confirmed: options that the checkpoint states and that this model has.
        differs: options of the checkpoint's model that this model has not (``strict=False``).
    """

    layout: str
    weights: str = ""
    averaged: bool = False
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    confirmed: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()


@checked
@unwrapping
def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Any] | WeightFile,
    layout: str | Layout = "auto",
    *,
    strict: bool = True,
    weights: str = "auto",
    keep: str | Sequence[str] = (),
    config: Any = None,
) -> LoadReport:
    """Load weights in our layout or in a published one.

    Args:
        model: a model, or a part with its own layout; nothing is changed unless everything fits. A
            model on the meta device is filled on the CPU.
        source: a safetensors or torch file, a folder or an index of shards as transformers and diffusers
            write them, or a state dict.
        layout: "auto", "effformer", the name of a published layout of the model's family, or any
            `Layout`.
        strict: missing or unexpected keys are an error, and so is a model that computes something
            else: with other options than the checkpoint states, or with some that the layout's
            network has not. Parts that leave the function of the model as it is until they are
            trained (gates that start open) may be missing altogether.
        weights: "auto" takes averaged weights where the file has some, "ema" asks for them, "raw"
            for those that the optimizer holds; or the name of an entry of the file.
        keep: modules or keys of the model that keep the values they have, as names or glob patterns:
            ``keep="head"`` for another number of classes.
        config: options of the checkpoint's model (a training command line, the config of a model of
            transformers or diffusers: a mapping, or an object with ``to_dict()``), if the file and the
            ``config.json`` beside it do not say them.

    Raises:
        FormatError: the file cannot be read, its layout is not recognised, keys or shapes do not
            fit, or its model computes something else.
        ValueError: unknown layout, or ``keep`` names nothing.
    """
    file = open_weights(source, weights, config, tensors_of(model), lazy=True)
    found = matched(model, file, layout, strict=strict, keep=keep)
    fill(model, found.state, where=file.where)
    if found.trained:
        model.trained = found.trained
    return found.report


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """Weights that fit a model.

    Attributes:
        state: its keys to tensors of its shapes.
        trained: what they were trained to predict, empty if nobody says so.
        report: what was found.
    """

    state: StateDict
    trained: Any
    report: LoadReport


def matched(
    model: nn.Module,
    file: WeightFile,
    layout: str | Layout,
    *,
    strict: bool,
    keep: str | Sequence[str],
) -> Matched:
    """The weights of a file by the names of a model, which stays as it is and may be on the meta device; see
    `load_weights`.
    """
    own = tensors_of(model)
    new = retired.rename(file.tensors, own.keys())
    state = {new.get(key, key): value for key, value in file.tensors.items()}
    state = _without_prefix(state, own)
    chosen = _choose_layout(model, state, layout, file)
    around = () if chosen is None else chosen.around
    ignored = sorted(key for key in state if key.startswith(around) and around)
    state = {key: value for key, value in state.items() if key not in ignored}
    kept = _kept(own, keep, model_name(model))
    differs, confirmed = _compare(model, chosen, file.facts, kept)
    if differs and strict and chosen is not None:
        raise FormatError(
            f"{file.where} does not fit {model_name(model)} (layout {chosen.name!r}): its network differs: "
            f"{', '.join(differs)}; build the model as the checkpoint's, or strict=False (--strict "
            "no) takes the weights as they fit"
        )
    if chosen is not None:
        state = chosen.to_ours(state, getattr(model, "config", None))
    state = {key: value for key, value in state.items() if key not in kept}
    reshaped, wrong = _fit(state, own)
    missing = sorted(_missing(own, state) - kept)
    unexpected = sorted(state.keys() - own.keys())
    needed = [key for key in missing if key not in _addable(model, missing)]
    if wrong or (strict and (needed or unexpected or differs)):
        parts = [f"its network differs: {', '.join(differs)}"] if strict and differs else []
        parts += [f"wrong shapes: {_some(wrong)}"] if wrong else []
        parts += [f"missing: {_some(needed)}"] if needed else []
        parts += [f"unexpected: {_some(unexpected)}"] if unexpected else []
        raise FormatError(
            f"{file.where} does not fit {model_name(model)}: {'; '.join(parts)}{_advice(differs, wrong)}"
        )
    published: Any = {} if chosen is None else getattr(model, "assumed", dict)()
    report = LoadReport(
        layout="effformer" if chosen is None else chosen.name, weights=file.weights,
        averaged=file.averaged, missing=tuple(missing), unexpected=tuple(unexpected),
        ignored=tuple(ignored), kept=tuple(sorted(kept)), reshaped=tuple(sorted(reshaped)),
        confirmed=tuple(confirmed), differs=tuple(differs),
    )  # fmt: skip
    return Matched(
        state={key: state[key] for key in state.keys() & own.keys()},
        trained=file.trained or published, report=report,
    )  # fmt: skip


def _advice(differs: Collection[str], wrong: Collection[str]) -> str:
    if wrong:
        return "; keep= (--keep) names modules that keep their own values, such as a head of other classes"
    if differs:
        return "; build the model as the checkpoint's, or strict=False (--strict no) takes the weights as they fit"
    return ""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a model by name."""
    state = model.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _without_prefix(state: StateDict, own: Collection[str]) -> StateDict:
    """Without a name that a training program put before all keys ("model.")."""
    heads = {key.partition(".")[0] for key in state}
    if len(heads) > 1 or state.keys() & set(own):
        return state
    shorter = {key.partition(".")[2]: value for key, value in state.items()}
    return shorter if shorter.keys() & set(own) else state


def _kept(own: Collection[str], keep: str | Sequence[str], name: str) -> set[str]:
    """Keys that stay as they are."""
    kept = set[str]()
    for pattern in [keep] if isinstance(keep, str) else keep:
        found = {k for k in own if fnmatchcase(k, pattern) or fnmatchcase(k, f"{pattern}.*")}
        if not found:
            heads = list(dict.fromkeys(key.partition(".")[0] for key in own))
            raise unknown("module", pattern, heads, where=f"{name}: keep")
        kept |= found
    return kept


# -- the network of a checkpoint -----------------------------------------------------------------------


def _compare(
    model: nn.Module, chosen: Layout | None, facts: Mapping[str, Any], kept: Collection[str]
) -> tuple[list[str], list[str]]:
    """What a checkpoint's network has in another way than the model, and what it says that is so."""
    config = getattr(model, "config", None)
    found = _named_network(model, facts)
    options: Mapping[str, Any] = {}
    if chosen is not None:
        # parts that do less work are seen in the keys: they are there, missing whole, or refused
        strange = chosen.strange(config)
        found |= {
            k: v for k, v in strange.items() if k.partition(".")[0] not in ("width", "tokens")
        }
        options = {} if found else chosen.options(config)
        found |= clashes(options, facts)
    elif isinstance(facts.get("effformer"), Mapping) and hasattr(model, "FAMILY"):
        found |= _ours(model, facts["effformer"])
    if kept:
        found.pop("num_classes", None)
    said = [name for name in options if facts.get(name) is not None and name not in found]
    return list(found.values()), said


def _named_network(model: nn.Module, facts: Mapping[str, Any]) -> dict[str, str]:
    """Differences from the published size that a checkpoint names ("DiT-XL/2")."""
    for key in ("architecture", "arch", "model_name", "model_type", "model"):
        name = facts.get(key)
        if not isinstance(name, str) or name not in registry.model:
            continue
        entry = registry.model.get(name)
        if entry.facts["family"] != getattr(model, "FAMILY", None):
            return {}
        pairs = {
            size: (getattr(entry.preset, size, None), getattr(model.config, size, None))
            for size in ("dim", "depth", "heads", "patch")
        }
        return {
            size: f"{name} has {size}={there!r}, this model {here!r}"
            for size, (there, here) in pairs.items()
            if there != here
        }
    return {}


def _ours(model: Any, facts: Mapping[str, Any]) -> dict[str, str]:
    """Differences from the config of a saved model of ours, but for what keys and shapes show."""
    there = facts.get("config")
    families = {entry.facts["family"]: entry for entry in registry.model}
    entry = families.get(str(facts.get("family")))
    if entry is None or not isinstance(there, Mapping):
        return {}
    found = {}
    conventions = [getattr(kind, "CONVENTION", None) for kind in (entry.build, type(model))]
    if conventions[0] != conventions[1]:
        found["family"] = f"family {entry.facts['family']!r}, which counts otherwise"
    saved = type(entry.preset).from_dict(there, where="config.json").to_dict()
    have, here = dict(_paths(saved)), dict(_paths(model.config.to_dict()))
    for path in have.keys() & here.keys():
        slot = path.partition(".")[0] in ("width", "tokens")
        if have[path] != here[path] and not slot and not _training(path):
            found[path] = f"{path} is {have[path]!r} there and {here[path]!r} here"
    return dict(sorted(found.items()))


def _training(path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in TRAINING)


def _paths(options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping) and "layers" not in (key, above):
            yield from _paths(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


# -- keys and shapes -----------------------------------------------------------------------------------


def _fit(state: StateDict, own: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """View tensors into the model's shapes, in place; keys that were viewed, and what does not fit."""
    reshaped, wrong = [], []
    for key in sorted(state.keys() & own.keys()):
        given, have = state[key], own[key]
        if why := unlike(given, have):
            wrong.append(f"{key} {why}")
        elif given.shape == have.shape:
            continue
        elif _viewable(given.shape, have.shape):
            state[key] = given.reshape(have.shape)
            reshaped.append(key)
        else:
            wrong.append(f"{key} is {tuple(given.shape)}, the model has {tuple(have.shape)}")
    return reshaped, wrong


def unlike(given: Tensor, have: Tensor) -> str:
    """Why a tensor of a file cannot be written into one of a model, "" if it can; shapes aside."""
    dtype, own = (str(x.dtype).removeprefix("torch.") for x in (given, have))
    if given.is_meta:
        return f"is without values, the model has {own}"
    if given.layout != torch.strided:
        return f"is {given.layout}, the model has dense tensors".replace("torch.", "")
    if _kind(given) != _kind(have):
        return f"is {dtype}, the model has {own}"
    if _kind(given) == "integer" and not torch.equal(given.to(have.dtype).to(given.dtype), given):
        return f"is {dtype} with values that {own}, which the model has, does not hold"
    return ""


def _kind(x: Tensor) -> str:
    if x.is_quantized:
        return "quantized"
    if x.is_complex():
        return "complex"
    if x.is_floating_point():  # in 8 bits and fewer they mean something with their scales only
        return "floating" if x.element_size() > 1 else str(x.dtype)
    return "bool" if x.dtype == torch.bool else "integer"


def tell_not_finite(model: nn.Module, given: StateDict, *, where: str) -> None:
    """Warn of values that are not finite, in what was just written into a model."""
    own = tensors_of(model)
    bad = [
        f"{key} (beyond {own[key].dtype})".replace("torch.", "") if _finite(given[key]) else key
        for key in sorted(given.keys() & own.keys())
        if own[key].is_floating_point() and not _finite(own[key])
    ]
    if bad:
        warnings.warn(
            f"{where}: NaN or infinite values in {_some(bad)}, and so in what the model computes; "
            "load sound weights, or train again from a checkpoint before they appeared",
            stacklevel=2,
        )


def _finite(x: Tensor) -> bool:
    return bool((x.float() if x.element_size() == 1 else x).isfinite().all())


def _missing(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> set[str]:
    """Keys that the file lacks; a tensor with two names needs one of them."""
    there = {id(tensor) for key, tensor in own.items() if key in state}
    return {key for key, tensor in own.items() if key not in state and id(tensor) not in there}


def _addable(model: nn.Module, missing: list[str]) -> set[str]:
    """Missing keys of parts that start neutral, if such a part is missing whole."""
    gone, found = set(missing), set[str]()
    for path, module in model.named_modules():
        if getattr(module, "neutral_start", False):
            keys = {f"{path}.{key}" for key in module.state_dict()}
            found |= keys if keys <= gone else set()
    return found


def _viewable(have: torch.Size, want: torch.Size) -> bool:
    """The shapes differ by dimensions of length 1, or by how those behind the first are grouped; a
    transposed matrix is not the same tensor in another shape.
    """
    if have.numel() != want.numel():
        return False
    return [n for n in have if n != 1] == [n for n in want if n != 1] or have[:1] == want[:1]


def model_name(model: nn.Module) -> str:
    """What messages call a model or a part."""
    return str(getattr(model, "name", type(model).__name__))


def _layouts(model: nn.Module) -> tuple[Layout, ...]:
    return getattr(model, "LAYOUTS", ())


def by_name(model: nn.Module, layout: str) -> Layout:
    """A published layout of a model.

    Raises:
        ValueError: it has no such layout.
    """
    known = {lay.name: lay for lay in _layouts(model)}
    if layout not in known:
        raise unknown("layout", layout, ["effformer", *known], where=model_name(model))
    return known[layout]


def _choose_layout(
    model: nn.Module, state: StateDict, layout: str | Layout, file: WeightFile
) -> Layout | None:
    """The foreign layout to convert from, None for our own."""
    if isinstance(layout, Layout):
        return layout
    if layout == "effformer":
        return None
    if layout != "auto":
        return by_name(model, layout)
    own = tensors_of(model).keys()
    if 2 * len(own & state.keys()) >= len(own):
        return None
    found = [candidate for candidate in _layouts(model) if candidate.recognise(state)]
    config = getattr(model, "config", None)
    for candidate in found:
        if not candidate.strange(config) and not clashes(candidate.options(config), file.facts):
            return candidate
    if found:
        return found[0]
    names = ", ".join(["effformer", *(lay.name for lay in _layouts(model))])
    raise FormatError(
        f"{file.where}: keys such as {_some(sorted(state))} fit none of the layouts of "
        f"{model_name(model)} ({names})"
    )


def _some(items: list[str], most: int = 4) -> str:
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


# -- filling -------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(model: nn.Module, state: StateDict, *, where: str) -> None:
    """Write tensors that fit into a model: all of them, or none if one of them cannot be written.

    What follows from the config is computed again by modules with ``reset_buffers()``; a model
    without storage (the meta device) gets some on the CPU.

    Args:
        model: the model.
        state: its keys to tensors of its shapes.
        where: begins the messages.

    Raises:
        FormatError: two names of one tensor have different values, a tensor cannot be written, or
            something on the meta device would stay empty.
    """
    own = tensors_of(model)
    first: dict[int, str] = {}
    for key in state:
        other = first.setdefault(id(own[key]), key)
        if other != key and not torch.equal(state[other], state[key]):
            raise FormatError(
                f"{where}: {other} and {key} differ, but are one tensor in this model"
            )
    _check_empty(model, state.keys(), where)
    before = {key: own[key].detach().clone() for key in state if not own[key].is_meta}
    _materialise(model)
    try:
        model.load_state_dict(state, strict=False)
    except Exception as error:  # hooks of foreign modules raise what they like
        model.load_state_dict(before, strict=False)
        raise FormatError(
            f"{where}: cannot be written into {model_name(model)} ({error})"
        ) from error
    for module in model.modules():
        reset: Callable[[], None] | None = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()
    tell_not_finite(model, state, where=where)


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any], str, str]]:
    """Module, its table, name in it and path of every parameter and buffer on the meta device."""
    for path, module in model.named_modules():
        for entries in (module._parameters, module._buffers):
            for name, tensor in entries.items():
                if tensor is not None and tensor.is_meta:
                    yield module, entries, name, f"{path}.{name}" if path else name


def _check_empty(model: nn.Module, given: Collection[str], where: str) -> None:
    """Refuse to leave something on the meta device."""
    tensors = model.state_dict(keep_vars=True)
    filled = {id(tensors[key]) for key in given}
    empty = [
        path
        for module, entries, name, path in _places(model)
        if id(entries[name]) not in filled
        and not (name in module._non_persistent_buffers_set and hasattr(module, "reset_buffers"))
    ]
    if empty:
        raise FormatError(
            f"{where}: {_some(empty)} would hold nothing, since {model_name(model)} is on the meta "
            "device; build the model on the CPU, or call its to_empty and reset_parameters first"
        )


def _materialise(model: nn.Module) -> None:
    """Give what is on the meta device storage on the CPU; tied tensors stay one."""
    made: dict[int, Tensor] = {}
    for _, entries, name, _ in list(_places(model)):
        old = entries[name]
        if id(old) not in made:
            empty = torch.empty_like(old, device="cpu")
            learned = isinstance(old, nn.Parameter)
            made[id(old)] = nn.Parameter(empty, old.requires_grad) if learned else empty
        entries[name] = made[id(old)]
