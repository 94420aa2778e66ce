"""Saving and loading: folders of ``config.json`` + ``model.safetensors``, and foreign weight files
as data.

Everything is written by `effformer.files`; foreign pickles are read with ``weights_only=True``,
always.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from . import registry, retired
from .arguments import checked
from .checks import FormatError, shown, unknown
from .files import atomic_folder, atomic_path, mark, read_json, read_whole, write_json
from .layout import Layout, StateDict
from .loading import LoadReport, by_name, load_weights, model_name
from .version import VERSION
from .weights import TRAINED, once, open_weights, same, unshared, with_trained
from .wrapped import unwrapping

if TYPE_CHECKING:
    from effformer.models.base import Model

__all__ = [
    "LoadReport", "atomic_folder", "atomic_path", "load_model", "load_weights", "read_json", "read_weights",
    "replay", "save_pretrained", "save_weights", "write_json",
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)

FORMAT = 1
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
TRANSFORMS = "effformer.transforms"
"""Key of the metadata of a file of weights that says how its model was changed."""
_WORTH = ("random", "compressed", "trained")
"""What weights are, from what any seed gives again to what nothing gives again."""
WEIGHTS = tuple(f"{worth} weights" for worth in _WORTH)
"""Kinds of files that `save_weights` writes."""


def model_folder(weights: str, *, by: str = "", force: bool = False) -> dict[str, Any]:
    """What `effformer.files.atomic_folder` and ``check_folder`` must know to save a model.

    Args:
        weights: what it is worth: "random", "compressed" or "trained".
        by: the verb that saves it, which replaces nothing that another verb saved; "": a program.
        force: an earlier model may be of any worth and by anybody.
    """

    def objection(folder: Path) -> str:
        try:
            facts = read_json(folder / _CONFIG)
            _check_facts(facts, folder / _CONFIG)
        except FormatError:
            return f"holds a {_CONFIG} that effformer did not write"
        there = facts.get("weights", "compressed" if facts["transforms"] else "trained")
        if there not in _WORTH[: _WORTH.index(weights) + 1]:
            return f"holds a model with {there} weights, which {weights} ones do not replace"
        author = facts.get("by", by)
        return f"holds a model that {author!r} wrote, not {by!r}" if by and author != by else ""

    return {"marker": _CONFIG, "own": (_WEIGHTS,), "objection": objection, "force": force}


def _worth(model: nn.Module) -> str:
    if getattr(model, "drawn", False):
        return "random"
    return "compressed" if getattr(model, "transforms", ()) else "trained"


@checked
@unwrapping
def save_pretrained(model: Model, folder: str | Path, *, by: str = "", force: bool = False) -> Path:
    """Write ``config.json`` and ``model.safetensors``; an earlier save at the same place is
    replaced whole.

    Args:
        model: the model.
        folder: new, empty, or an earlier save whose weights are worth no more: trained or loaded
            ones are worth more than compressed ones, those more than random ones.
        by: the verb of the command line that saves; it replaces nothing that another one saved.
        force: replace an earlier save of any worth.

    Raises:
        FormatError: the folder holds other files or a model that is worth more, or cannot be
            written.
        ValueError: the model is an optimized copy.
    """
    from safetensors.torch import save_file

    if not hasattr(model, "FAMILY"):
        raise TypeError(
            f"save_pretrained: expected a model of this library, got {shown(model)}; save_weights "
            "writes the weights of any module"
        )
    if getattr(model, "inference_only", False):
        raise ValueError(f"{model.name}: an optimized copy cannot be saved; save the original")
    facts = {
        "format": FORMAT,
        "effformer": VERSION,
        "family": model.FAMILY,
        "name": model.name,
        "config": model.config.to_dict(),
        "transforms": list(model.transforms),
        "weights": _worth(model),
        "by": by or "save_pretrained",
        "trained": model.trained,
    }
    state = unshared(once(_tensors(model)))
    kind = model_folder(facts["weights"], by=by, force=force)
    with atomic_folder(folder, **kind) as temporary:
        save_file(state, temporary / _WEIGHTS, metadata=metadata_of(model))
        write_json(temporary / _CONFIG, facts)
    return Path(folder)


@checked
def load_model(folder: str | Path) -> Model:
    """Rebuild a model saved by `save_pretrained`, quantized ones included.

    Raises:
        FormatError: not such a folder, written by a newer version, or the weights do not fit.
    """
    return read_whole(Path(folder), lambda: _load_model(Path(folder)))


def _load_model(folder: Path) -> Model:
    if not (folder / _CONFIG).is_file():
        run = (folder / "run.json").is_file()
        hint = "it is a training run, which effformer.train.load_run reads"
        raise FormatError(
            f"{folder}: no {_CONFIG}; {hint if run else 'expected a folder written by save_pretrained'}"
        )
    facts = read_json(folder / _CONFIG)
    _check_facts(facts, folder / _CONFIG)
    if facts["format"] > FORMAT:
        raise FormatError(
            f"{folder / _CONFIG}: written by effformer {facts.get('effformer')} in format {facts['format']}, "
            f"this is effformer {VERSION} (format {FORMAT}); pip install -U effformer"
        )
    model = rebuilt(facts, folder / _CONFIG)
    file = open_weights(folder / _WEIGHTS, config={}, lazy=True)
    load_weights(_typed(model, file.tensors), file, layout="effformer")
    model.trained = facts.get("trained")
    return model.eval()


def rebuilt(facts: Mapping[str, Any], where: Path) -> Model:
    """The model that a file describes, without its weights.

    Args:
        facts: its ``family``, ``name``, ``config`` and ``transforms``.
        where: the file, for messages.

    Raises:
        FormatError: the file is damaged, or a newer version wrote it.
        ValueError: no such family, or a config that is none of it.
    """
    families = {e.facts["family"]: e for e in registry.model}
    if facts["family"] not in families:
        raise unknown("model family", str(facts["family"]), list(families), where=str(where))
    entry = families[facts["family"]]
    config = type(entry.preset).from_dict(facts["config"], where=str(where))
    model: Model = entry.build(config, name=facts["name"])
    for record in facts["transforms"]:
        model = replay(model, _renewed(model, record))
    return model


def _typed(model: M, state: StateDict) -> M:
    """A model with the floating-point types of its weights, in which it was saved. That of its parameters is
    also what packed weights decode to, whose scales have a type of their own.
    """
    saved = [state[name] for name, _ in model.named_parameters() if name in state]
    kinds = {x.dtype for x in saved if x.is_floating_point()}
    if len(kinds) == 1:
        model = model.to(kinds.pop())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state and tensor.is_floating_point() and state[name].is_floating_point():
            tensor.data = tensor.data.to(state[name].dtype)
    return model


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


@checked
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


@checked
def read_weights(
    source: str | Path | Mapping[str, Any], weights: str = "auto", *, lazy: bool = False
) -> StateDict:
    """Read a state dict from safetensors, or from a torch file with ``weights_only=True``.

    Training checkpoints are unwrapped, and the names that compiling and wrapping put into keys
    ("module.", "_orig_mod.") removed.

    Args:
        source: the file, or what it would hold.
        weights: "auto" takes averaged weights where there are some, "ema" asks for them, "raw" for
            those that the optimizer holds; or the name of an entry of the file.
        lazy: tensors of safetensors files know their shape and type, whatever the size of the file;
            `effformer.lazy.values` reads their numbers, and so does copying them into another tensor.

    What the weights were trained to predict comes along where the source says it (files and state
    dicts of our models do). Weights in a published layout that say nothing are taken for published
    ones; of others in our layout it stays as ``model.trained`` has it.

    Raises:
        FormatError: missing, truncated or foreign file, one that would run code when unpickled, or
            one without such weights.
    """
    file = open_weights(source, weights, lazy=lazy)
    return with_trained(file.tensors, file.trained)


@checked
@unwrapping
def save_weights(
    model: nn.Module,
    path: str | Path,
    layout: str | Layout = "effformer",
    *,
    force: bool = False,
) -> Path:
    """Write the weights as one safetensors file, in our layout or in a published one. Our layout holds
    tied tensors once, under the first of their names.

    Args:
        model: a model or a part.
        path: the file: new, or one that this function wrote, with weights that are worth no more
            (see `save_pretrained`).
        layout: "effformer", the name of a published layout of the model's family, or any `Layout`.
        force: replace any file.

    Raises:
        ValueError: unknown layout.
        FormatError: the place cannot be written, or holds something else; or the layout's network
            does not compute what the model computes: it has other parts, or was quantized.
    """
    from safetensors.torch import save_file

    if layout == "effformer":
        state = once(_tensors(model))
    else:
        chosen = layout if isinstance(layout, Layout) else by_name(model, layout)
        state = translated(model, chosen, _tensors(model))
    kinds = WEIGHTS[: _WORTH.index(_worth(model)) + 1]
    with atomic_path(path, *kinds, force=force) as temporary:
        facts = metadata_of(model) | {"generator": mark(kinds[-1])}
        save_file(unshared(state), temporary, metadata=facts)
    return Path(path)


def metadata_of(model: nn.Module, trained: Any = None) -> dict[str, str]:
    """What a file of weights says beside its tensors; what they were trained to predict says the model where
    nobody else does.
    """
    trained = trained or getattr(model, "trained", None)
    done = list(getattr(model, "transforms", ()))
    facts = {"format": "pt"} | ({TRANSFORMS: json.dumps(done)} if done else {})
    return facts | ({TRAINED: json.dumps(trained)} if isinstance(trained, dict) else {})


def _tensors(model: nn.Module) -> StateDict:
    """Tensors of a model by name."""
    return {key: x for key, x in model.state_dict().items() if isinstance(x, Tensor)}


def translated(model: nn.Module, layout: Layout, state: StateDict) -> StateDict:
    """The tensors in a published layout, which gives them back as they are.

    Raises:
        FormatError: it cannot hold them.
    """
    config, where = getattr(model, "config", None), f"{model_name(model)}: layout {layout.name!r}"
    instead = "layout='effformer' holds any model"
    if strange := layout.strange(config):
        raise FormatError(f"{where} has no {', '.join(strange.values())}; {instead}")
    if hasattr(model, "FAMILY"):
        with torch.device("meta"):
            plain = type(model)(config)
        built = {key: value.shape for key, value in _tensors(plain).items()}
        if built != {key: value.shape for key, value in state.items()}:
            done = ", ".join(r["kind"] for r in getattr(model, "transforms", ())) or "changed"
            raise FormatError(
                f"{where} holds models as they are built, but this one was changed since ({done}); "
                "save_pretrained keeps the change"
            )
    out = layout.from_ours(dict(state), config)
    back = layout.to_ours(dict(out), config)
    lost = [k for k in state if k not in back or not same(back[k], state[k])]
    if lost or len(back) > len(state):
        lost += sorted(back.keys() - state.keys())
        raise FormatError(f"{where} cannot hold {', '.join(lost[:3])} of this model; {instead}")
    return out
