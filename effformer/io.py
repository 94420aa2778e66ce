"""Saving and loading: folders of ``config.json`` + ``model.safetensors``, and foreign weight files
as data.

Files are written to a temporary name and renamed; foreign pickles are read with
``weights_only=True``, always.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import registry, retired
from .checks import FormatError, unknown
from .files import atomic_folder, atomic_path, read_json, write_json
from .layout import Layout, StateDict
from .version import VERSION

if TYPE_CHECKING:
    from effformer.models.base import Model

__all__ = [
    "LoadReport", "atomic_folder", "atomic_path", "load_model", "load_weights", "read_json", "read_weights",
    "replay", "save_pretrained", "save_weights", "write_json",
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)

FORMAT = 1
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TRAINED = "effformer.trained"
MODEL_FOLDER: Any = {"marker": _CONFIG, "own": (_WEIGHTS,)}
_WRAPPERS = ("ema", "model_ema", "state_dict", "model", "module")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What `load_weights` did.

    Attributes:
        layout: name of the layout that was recognised.
        missing: our keys that the file does not have.
        unexpected: keys of the file that the model does not have.
        reshaped: our keys whose tensors were viewed into another shape of equal size.
    """

    layout: str
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()


def save_pretrained(model: Model, folder: str | Path) -> Path:
    """Write ``config.json`` and ``model.safetensors``; an earlier save at the same place is
    replaced whole.

    Raises:
        FormatError: the folder holds other files or cannot be written.
        ValueError: the model is an optimized copy.
    """
    from safetensors.torch import save_file

    if getattr(model, "inference_only", False):
        raise ValueError(f"{model.name}: an optimized copy cannot be saved; save the original")
    facts = {
        "format": FORMAT,
        "effformer": VERSION,
        "family": model.FAMILY,
        "name": model.name,
        "config": model.config.to_dict(),
        "transforms": list(model.transforms),
        "trained": model.trained,
    }
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    with atomic_folder(folder, **MODEL_FOLDER) as temporary:
        save_file(state, temporary / _WEIGHTS, metadata=_metadata(model))
        write_json(temporary / _CONFIG, facts)
    return Path(folder)


def load_model(folder: str | Path) -> Model:
    """Rebuild a model saved by `save_pretrained`, quantized ones included.

    Raises:
        FormatError: not such a folder, written by a newer version, or the weights do not fit.
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        raise FormatError(f"{folder}: no {_CONFIG}; expected a folder written by save_pretrained")
    facts = read_json(folder / _CONFIG)
    _check_facts(facts, folder / _CONFIG)
    if facts["format"] > FORMAT:
        raise FormatError(
            f"{folder / _CONFIG}: written by effformer {facts.get('effformer')} in format {facts['format']}, "
            f"this is effformer {VERSION} (format {FORMAT}); pip install -U effformer"
        )
    families = {e.facts["family"]: e for e in registry.model}
    if facts["family"] not in families:
        raise unknown(
            "model family", str(facts["family"]), list(families), where=str(folder / _CONFIG)
        )
    entry = families[facts["family"]]
    config = type(entry.preset).from_dict(facts["config"], where=str(folder / _CONFIG))
    model: Model = entry.build(config, name=facts["name"])
    for record in facts["transforms"]:
        model = replay(model, _renewed(model, record))
    load_weights(model, folder / _WEIGHTS, layout="effformer")
    model.trained = facts.get("trained")
    return model.eval()


def _renewed(model: nn.Module, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record with the present paths of the layers that it names."""
    layers = record.get("layers")
    if not isinstance(layers, list) or not all(isinstance(path, str) for path in layers):
        return record
    new = retired.rename(layers, {path for path, _ in model.named_modules()})
    return {**record, "layers": [new.get(path, path) for path in layers]}


def _check_facts(facts: Any, path: Path) -> None:
    kinds = {"format": int, "family": str, "name": str, "config": dict, "transforms": list}
    if not isinstance(facts, dict):
        raise FormatError(f"{path}: is not an effformer config, it holds a {type(facts).__name__}")
    for key, kind in kinds.items():
        if not isinstance(facts.get(key), kind) or facts[key] is True:
            found = repr(facts[key]) if key in facts else "nothing"
            raise FormatError(
                f"{path}: is not an effformer config; {key} is {found}, expected {kind.__name__}"
            )
    if facts["format"] < 1 or not all(isinstance(t, dict) for t in facts["transforms"]):
        raise FormatError(f"{path}: is not an effformer config; format or transforms are damaged")
    if not isinstance(facts.get("trained"), dict | None):
        raise FormatError(f"{path}: trained is {facts['trained']!r}, expected a dict or null")


def replay(model: M, record: Mapping[str, Any]) -> M:
    """Rebuild the structure that a record of ``model.transforms`` describes, in place, before
    weights are loaded; the registry `effformer.registry.transform` knows how.

    Raises:
        FormatError: the record is not one of ours, or does not fit the model.
    """
    try:
        entry = registry.transform.get(record.get("kind", ""))
    except (TypeError, ValueError) as error:
        known = ", ".join(map(repr, registry.transform.names()))
        raise FormatError(
            f"transform {record.get('kind')!r}: unknown; known: {known}. "
            "A newer effformer may have written it"
        ) from error
    changed: M = entry.build(model, record)
    records: tuple[dict[str, Any], ...] = getattr(changed, "transforms", ())
    changed.transforms = (*records, dict(record))  # type: ignore[assignment]
    return changed


def read_weights(source: str | Path | Mapping[str, Tensor]) -> StateDict:
    """Read a state dict from safetensors, or from a torch file with ``weights_only=True``.

    Training checkpoints are unwrapped ("ema" before "model"), and the prefixes of wrappers
    ("module.") removed.

    Raises:
        FormatError: missing, truncated or foreign file, or one that would run code when unpickled.
    """
    state: Any = source if isinstance(source, Mapping) else _read_file(Path(source))
    for wrapper in _WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    where = "state dict" if isinstance(source, Mapping) else str(source)
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise FormatError(f"{where}: holds no tensors by name; expected a state dict")
    # parallel and compiled wrappers come in either order
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return _with_trained(tensors, _trained_in(state))


def _with_trained(tensors: Mapping[str, Tensor], trained: Any) -> StateDict:
    """A state dict that says what its weights were trained to predict, where torch's do."""
    state: Any = OrderedDict(tensors)
    state._metadata = OrderedDict({} if trained is None else {"": {"trained": trained}})
    return cast(StateDict, state)


def _trained_in(state: Mapping[str, Any]) -> Any:
    """What a state dict says that its weights were trained to predict, None if nothing."""
    modules = getattr(state, "_metadata", {}).values()
    return next((facts["trained"] for facts in modules if "trained" in facts), None)


def _read_file(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                said = (file.metadata() or {}).get(_TRAINED, "null")
            return _with_trained(load_file(path), json.loads(said))
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(
                f"{path}: is truncated or not a safetensors file ({error})"
            ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # other pickle protocols: read or refused
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path}: holds pickled objects other than tensors, or is no checkpoint; effformer reads data, not code: "
            "save a plain state dict or safetensors"
        ) from error
    except Exception as error:  # the reader meets rubbish with whatever its next step raises
        raise FormatError(f"{path}: is truncated or not a torch checkpoint ({error})") from error
    if not isinstance(state, Mapping):
        raise FormatError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    return state


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    layout: str | Layout = "auto",
    *,
    strict: bool = True,
) -> LoadReport:
    """Load weights in our layout or in a published one.

    Args:
        model: a model, or a part with its own layout; nothing is changed unless everything fits.
        source: a safetensors or torch file, or a state dict.
        layout: "auto", "effformer", the name of a published layout of the model's family, or any
            `Layout`.
        strict: missing or unexpected keys are an error. Parts that leave the function of the model
            as it is until they are trained (gates that start open) may be missing altogether.

    What the weights were trained to predict comes along where the source says it (files and state
    dicts of our models do). Weights in a published layout that say nothing are taken for published
    ones; of others in our layout it stays as ``model.trained`` has it.

    Raises:
        FormatError: the file cannot be read, its layout is not recognised, or keys or shapes do not
            fit.
        ValueError: unknown layout.
    """
    state = read_weights(source)
    trained = _trained_in(state)
    new = retired.rename(state, model.state_dict().keys())
    state = {new.get(key, key): value for key, value in state.items()}
    where = "state dict" if isinstance(source, Mapping) else str(source)
    chosen = _choose_layout(model, state, layout, where)
    if chosen is not None:
        state = chosen.to_ours(state, getattr(model, "config", None))
    own = model.state_dict()
    reshaped, wrong = [], []
    for key in state.keys() & own.keys():
        if state[key].shape == own[key].shape:
            continue
        if _viewable(state[key].shape, own[key].shape):
            state[key] = state[key].reshape(own[key].shape)
            reshaped.append(key)
        else:
            wrong.append(
                f"{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}"
            )
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    needed = [key for key in missing if key not in _addable(model, missing)]
    if wrong or (strict and (needed or unexpected)):
        parts = [f"wrong shapes: {_some(wrong)}"] if wrong else []
        parts += [f"missing: {_some(needed)}"] if needed else []
        parts += [f"unexpected: {_some(unexpected)}"] if unexpected else []
        raise FormatError(f"{where} does not fit {_name(model)}: {'; '.join(parts)}")
    model.load_state_dict({k: state[k] for k in state.keys() & own.keys()}, strict=False)
    if trained is None and chosen is not None:
        trained = getattr(model, "assumed", dict)() or None
    if trained is not None:
        model.trained = trained
    return LoadReport(
        layout="effformer" if chosen is None else chosen.name,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        reshaped=tuple(sorted(reshaped)),
    )


def save_weights(model: nn.Module, path: str | Path, layout: str | Layout = "effformer") -> Path:
    """Write the weights as one safetensors file, in our layout or in a published one.

    Args:
        model: a model or a part.
        path: the file.
        layout: "effformer", the name of a published layout of the model's family, or any `Layout`.

    Raises:
        ValueError: unknown layout.
        FormatError: the place cannot be written.
    """
    from safetensors.torch import save_file

    state = dict(model.state_dict())
    if layout != "effformer":
        chosen = layout if isinstance(layout, Layout) else _by_name(model, layout)
        state = chosen.from_ours(state, getattr(model, "config", None))
    with atomic_path(path) as temporary:
        save_file(
            {k: v.contiguous().clone() for k, v in state.items()},
            temporary,
            metadata=_metadata(model),
        )
    return Path(path)


def _metadata(model: nn.Module) -> dict[str, str]:
    """What a file of weights says beside its tensors."""
    trained = getattr(model, "trained", None)
    return {"format": "pt"} | ({_TRAINED: json.dumps(trained)} if isinstance(trained, dict) else {})


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


def _name(model: nn.Module) -> str:
    return str(getattr(model, "name", type(model).__name__))


def _layouts(model: nn.Module) -> tuple[Layout, ...]:
    return getattr(model, "LAYOUTS", ())


def _by_name(model: nn.Module, layout: str) -> Layout:
    known = {lay.name: lay for lay in _layouts(model)}
    if layout not in known:
        raise unknown("layout", layout, ["effformer", *known], where=_name(model))
    return known[layout]


def _choose_layout(
    model: nn.Module, state: StateDict, layout: str | Layout, where: str
) -> Layout | None:
    """The foreign layout to convert from, None for our own."""
    if isinstance(layout, Layout):
        return layout
    if layout == "effformer":
        return None
    if layout != "auto":
        return _by_name(model, layout)
    own = model.state_dict().keys()
    if len(own & state.keys()) > len(own) // 2:
        return None
    for candidate in _layouts(model):
        if candidate.recognise(state.keys()):
            return candidate
    names = ", ".join(["effformer", *(lay.name for lay in _layouts(model))])
    sample = _some(sorted(state))
    raise FormatError(
        f"{where}: keys such as {sample} fit none of the layouts of {_name(model)} ({names})"
    )


def _some(items: list[str], most: int = 4) -> str:
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
