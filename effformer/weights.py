"""Files of weights: which of the tensors in them are the model's, and what the files say about the
model.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from .checks import FormatError, check_values
from .files import inside, read_json
from .layout import StateDict
from .lazy import LazyTensor, values
from .pickled import read_pickled
from .shards import INDEX, lazy_file
from .wrapped import COUNT, plain_keys

__all__ = ["TRAINED", "WeightFile", "once", "open_weights", "same", "unshared", "with_trained"]

TRAINED = "effformer.trained"
"""Key of the metadata of a safetensors file that says what the weights were trained to predict."""

_AVERAGED = re.compile(r"(.*[_.-])?(ema|swa|avg|averaged?|shadow|polyak|teacher)\d*([_.-].*)?")
_RAW = (
    "state_dict", "model_state_dict", "model", "module", "model_state", "net", "network", "params", "weights",
    "student", "online", "generator",
)  # fmt: skip
_FACTS = (
    "args", "config", "cfg", "hyper_parameters", "hparams", "model_args", "model_kwargs", "model_config", "model_cfg",
)  # fmt: skip
_FILES = (
    "model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin",
)  # fmt: skip
"""What transformers and diffusers call their files of weights."""
_NAMES = ("arch", "architecture", "model_name", "model")
_FOREIGN = ("model_type", "_class_name", "architecture", "architectures", "effformer")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """What a file of weights holds.

    Attributes:
        where: the file, for messages.
        tensors: the weights by name.
        weights: the entry that they stood in, such as "state_dict_ema"; "" for the file itself.
        averaged: that entry is an average over training.
        facts: what the file, or the ``config.json`` beside it, says about the model.
        trained: what the weights were trained to predict, None if the file does not say it.
    """

    where: str
    tensors: StateDict
    weights: str = ""
    averaged: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    trained: Mapping[str, Any] | None = None


def open_weights(
    source: str | Path | Mapping[str, Any] | WeightFile,
    weights: str = "auto",
    config: Any = None,
    own: Collection[str] = (),
    *,
    lazy: bool = False,
) -> WeightFile:
    """Read weights from safetensors, from a torch file with ``weights_only=True``, or from a state
    dict that is in memory.

    Args:
        source: the file, a folder or an index of shards as transformers and diffusers write them, what
            the file would hold, or one that was opened before.
        weights: "auto" takes averaged weights where there are some, "ema" asks for them, "raw" for
            those that the optimizer holds; or the name of an entry.
        config: what the weights' own model was told, instead of what the file says about it; a mapping
            or an object with ``to_dict()``.
        own: keys of the model that the weights are for, which tell its own names from those that
            wrappers put into keys.
        lazy: tensors of safetensors files stay lazy (`effformer.lazy`): their values are read when they are
            asked for.

    Raises:
        FormatError: missing, truncated or foreign file, one that would run code when unpickled, or
            one without such weights.
    """
    entries: Mapping[str, Any]
    if isinstance(source, WeightFile):
        return source
    if isinstance(source, Mapping):
        where, entries = "state dict", source
    else:
        source = _in_folder(Path(source))
        where, entries = str(source), _read_file(source)
    path, tensors = _find(entries, weights, where)
    if not tensors:
        raise FormatError(f"{where}: holds no tensors by name; expected a state dict")
    averaged = any(_AVERAGED.fullmatch(name) for name in path)
    names = plain_keys(tensors, own)
    averaged |= COUNT in tensors.keys() - names  # torch's AveragedModel
    tensors = {new: tensors[key] if lazy else values(tensors[key]) for key, new in names.items()}
    facts = dict(_facts(entries, source)) if config is None else dict(_flat(_told(config)))
    return WeightFile(
        where=where, tensors=tensors, weights=".".join(path), averaged=averaged, facts=facts,
        trained=_trained_in(entries, path),
    )  # fmt: skip


def with_trained(tensors: Mapping[str, Tensor], trained: Any) -> StateDict:
    """A state dict that says what its weights were trained to predict, where torch's do."""
    state: Any = OrderedDict(tensors)
    state._metadata = OrderedDict({} if trained is None else {"": {"trained": trained}})
    return cast(StateDict, state)


def _trained_in(entries: Mapping[str, Any], path: Sequence[str]) -> Any:
    """What the state dict at a path says that its weights were trained to predict."""
    for name in path:
        entries = entries[name] if isinstance(entries.get(name), Mapping) else {}
    modules = getattr(entries, "_metadata", {}).values()
    return next((facts["trained"] for facts in modules if "trained" in facts), None)


def once(tensors: Mapping[str, Tensor]) -> StateDict:
    """Tied tensors under their first name only, as files of transformers hold them; the model that
    they are loaded into knows its ties.
    """
    first: dict[Any, str] = {}
    for name, x in tensors.items():
        place = x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()
        first.setdefault(place, name)
    return {name: tensors[name] for name in first.values()}


def unshared(tensors: Mapping[str, Tensor]) -> StateDict:
    """Contiguous tensors with storage of their own: safetensors refuses tied weights.

    Raises:
        ValueError: a tensor has no values.
    """
    seen: set[int] = set()
    out = {}
    for key, value in tensors.items():
        check_values(value, where=f"cannot be saved: {key}")
        own = value.detach().contiguous()
        own = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
        out[key] = own
    return out


def same(a: Tensor, b: Tensor) -> bool:
    """Equal tensors, also where they hold no numbers; of lazy ones only the shapes are looked at."""
    if a.shape != b.shape:
        return False
    if isinstance(a, LazyTensor) and isinstance(b, LazyTensor):
        return True
    a, b = values(a), values(b)
    a = a.to(b)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _in_folder(path: Path) -> Path:
    """The file of weights in a folder; a file is itself."""
    if not path.is_dir():
        return path
    for name in (*_FILES, *(f"{name}{INDEX}" for name in _FILES)):
        if (path / name).is_file():
            return path / name
    raise FormatError(f"{path}: a folder without weights ({', '.join(_FILES)}); name the file")


def _read_shards(index: Path) -> StateDict:
    """The tensors of all files that an index names."""
    facts = read_json(index)
    places = facts.get("weight_map") if isinstance(facts, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise FormatError(f"{index}: is not an index of shards; it has no weight_map")
    found: StateDict = {}
    said: Any = None
    last: dict[Any, Tensor] = {}
    for name in sorted(set(places.values())):
        shard = inside(index.parent, name)
        if shard is None or shard.name.endswith(INDEX):
            raise FormatError(
                f"{index}: names {name!r}, which is no file of weights in its folder, symbolic links "
                "followed; copy the files into one folder"
            )
        if not shard.is_file():
            raise FormatError(f"{index}: names {name}, which is missing; copy all shards beside it")
        read = _read_file(shard, last)
        said = said or _trained_in(read, ())
        found |= {key: x for key, x in read.items() if places.get(key) == name}
    if lost := sorted(places.keys() - found.keys()):
        raise FormatError(f"{index}: {lost[0]} and {len(lost) - 1} more are not in their files")
    return with_trained(found, said)


def _read_file(path: Path, last: dict[Any, Tensor] | None = None) -> Mapping[str, Any]:
    """What a file holds; tensors of safetensors files are lazy."""
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        tensors, about = lazy_file(path, last)
        return with_trained(tensors, _json(about.get(TRAINED, "null"), path))
    found = read_pickled(path)
    if not isinstance(found, Mapping):
        raise FormatError(f"{path}: holds a {type(found).__name__}, expected a state dict")
    return found


def _json(text: str, path: Path) -> Any:
    """What the metadata of a file say.

    Raises:
        FormatError: they are no JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise FormatError(f"{path}: its metadata are damaged ({error})") from error


# -- which weights -----------------------------------------------------------------------------------


def _find(
    entries: Mapping[str, Any], weights: str, where: str
) -> tuple[tuple[str, ...], StateDict]:
    """Names of the entries on the way to the weights, and the weights."""
    nested = {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, Mapping)}
    own = {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, Tensor)}
    groups = _groups(own) if not any(map(_holds, nested.values())) else {}
    found = {k: v for k, v in nested.items() if _holds(v)} | groups
    averaged = [k for k in entries if isinstance(k, str) and _AVERAGED.fullmatch(k)]
    averaged = [k for k in averaged if k in nested or isinstance(entries[k], (list, tuple))]
    averaged += [k for k in groups if _AVERAGED.fullmatch(k)]
    if weights not in ("auto", "ema", "raw"):
        if weights not in found:
            names = ", ".join(["auto", "ema", "raw", *found])
            raise FormatError(f"{where}: has no entry {weights!r}; choices of weights: {names}")
        return _below(found, weights, "auto", where)
    if averaged and weights != "raw":
        return _averaged(found, averaged, where)
    raw = [k for k in _RAW if k in found]
    raw += [k for k in found if not averaged and len(found) == 1 and not own and k not in raw]
    if raw and (groups or not own):
        return _below(found, raw[0], weights, where)
    if weights == "ema" and COUNT not in own:
        raise FormatError(f"{where}: has no averaged weights; weights='raw' takes what there is")
    return (), own


def _averaged(
    found: Mapping[str, Mapping[str, Any]], names: list[str], where: str
) -> tuple[tuple[str, ...], StateDict]:
    if len(names) > 1:
        raise FormatError(
            f"{where}: holds several averages ({', '.join(names)}); choose one, for instance "
            f"weights={names[0]!r}"
        )
    if names[0] not in found:
        raise FormatError(
            f"{where}: its averaged weights ({names[0]!r}) have no names; weights='raw' takes the others"
        )
    return _below(found, names[0], "auto", where)


def _below(
    found: Mapping[str, Mapping[str, Any]], name: str, weights: str, where: str
) -> tuple[tuple[str, ...], StateDict]:
    path, tensors = _find(found[name], weights, where)
    return (name, *path), tensors


def _holds(entry: Any) -> bool:
    """The entry is a mapping with weights by name, directly or in an entry of its own."""
    return isinstance(entry, Mapping) and any(
        isinstance(k, str) and (isinstance(v, Tensor) or _holds(v)) for k, v in entry.items()
    )


def _groups(tensors: StateDict) -> dict[str, StateDict]:
    """Averaged and raw weights that stand side by side in one flat state dict, by their prefixes
    ("model.", "ema_model."); empty if there are no such two.
    """
    heads = {key.partition(".")[0] for key in tensors if "." in key}
    averages = {head for head in heads if _AVERAGED.fullmatch(head)}
    raw = next((head for head in _RAW if head in heads), None)
    if not averages or raw is None:
        return {}
    own = {k.removeprefix(f"{raw}."): v for k, v in tensors.items() if k.startswith(f"{raw}.")}
    made = {raw: own}
    for head in averages:
        inside = {
            k.removeprefix(f"{head}."): v for k, v in tensors.items() if k.startswith(f"{head}.")
        }
        inside = {k.removeprefix("module."): v for k, v in inside.items()}
        # some averages are kept under names without dots; buffers have no average
        named = {k: inside.get(k, inside.get(k.replace(".", ""), v)) for k, v in own.items()}
        if any(named[k] is not v for k, v in own.items()):
            made[head] = named
    return made


# -- what the file says --------------------------------------------------------------------------------


def _facts(entries: Mapping[str, Any], source: object) -> Iterator[tuple[str, Any]]:
    """Options of the weights' own model by name, the outermost last."""
    beside = None if isinstance(source, Mapping) else Path(str(source)).with_name("config.json")
    if beside is not None and beside.is_file():
        try:
            found = read_json(beside)
        except FormatError:
            found = None
        if isinstance(found, dict) and any(key in found for key in _FOREIGN):
            yield from ([("effformer", found)] if "effformer" in found else _flat(found))
    for name in _FACTS:
        if isinstance(entries.get(name), Mapping) and not _holds(entries[name]):
            yield from _flat(entries[name])
    yield from ((k, entries[k]) for k in _NAMES if isinstance(entries.get(k), str))


def _told(config: Any) -> Mapping[str, Any]:
    """Options as a mapping; configs of transformers are objects."""
    found = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(found, Mapping):
        raise TypeError(f"weights: config is a mapping of options, got {type(config).__name__}")
    return found


def _flat(options: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Options of nested sections by their own names; outer ones win."""
    for value in options.values():
        if isinstance(value, Mapping):
            yield from _flat(value)
    yield from ((str(k), v) for k, v in options.items() if not isinstance(v, (Mapping, Tensor)))
