"""`effformer show`: everything about one name, one saved model, run, bundle, graph or file of weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import unknown
from .common import Json, emit, is_run, parse_value

if TYPE_CHECKING:
    from ..registry import Entry


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="A registered name, the folder of a saved model, a training run or a bundle, an "
            ".onnx file, or safetensors (of shards the .index.json)."
        ),
    ],
    compat: Annotated[
        bool,
        typer.Option(
            "--compat",
            help="Of an attention, FFN or block: the models, blocks, masks and positions that it works "
            "with, and why not with the others.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the config, capabilities, paper, size and key layouts of a part or model; of a part also what
    each of its options means; of a file of weights, whatever its size, what it holds and whose they may be.

    Examples: `effformer show flow`, `effformer show flow --compat`, `effformer show DiT-B/2`, `effformer show runs/digits`,
    `effformer show model.onnx`, `effformer show sd3/model.safetensors.index.json`
    """
    place = Path(name)
    file = place.suffix == ".onnx" or place.name.endswith((".safetensors", ".index.json"))
    if compat and (place.is_dir() or file):
        raise ValueError(
            f"show {name} --compat: wants the name of a part; effformer list attention"
        )
    found = [_place(place)] if place.is_dir() or file else [_entry(e, compat) for e in _find(name)]
    emit(found, "\n\n".join(_text(facts) for facts in found), as_json)


def _find(name: str) -> list[Entry]:
    from ..registry import KINDS

    found = [registry.get(name) for registry in KINDS.values() if name in registry]
    found = [entry for entry in found if not entry.core]  # the core says all of it
    if not found:
        names = sorted({e.name for registry in KINDS.values() for e in registry})
        raise unknown("name", name, names, hint=f"{len(names)} known: effformer list")
    return found


def _entry(entry: Entry, compat: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": entry.kind,
        "name": entry.name,
        "summary": entry.summary,
        "paper": entry.paper,
        "aliases": list(entry.aliases),
        "caps": asdict(entry.caps),
    }
    if entry.kind == "model":
        import torch

        with torch.device("meta"):
            model = entry.build(entry.preset, name=entry.name)
        facts |= _model(model)
        facts |= {name: entry.facts.get(name, "") for name in ("source", "licence", "sampling")}
        del facts["caps"]
    elif entry.preset is not None:
        facts["config"] = entry.preset.to_dict()
    elif entry.config is not None:
        facts["config"] = _defaults(entry.config)
    if entry.kind != "model" and entry.config is not None:
        facts["options"] = entry.config.meanings()
    facts |= {"heads": dict(entry.heads)} if entry.heads else {}
    return facts | ({"works": _works(entry)} if compat else {})


def _works(entry: Entry) -> dict[str, Any]:
    """What a part works with, and why not with the others."""
    from ..testing.matrix import PARTNERS, Built, beside, places

    kind = "attention" if entry.kind == "core" else entry.kind
    if kind not in PARTNERS:
        raise ValueError(f"show {entry.name} --compat: a {kind} stands in no slot of a model")
    found = {"models": places(kind, entry.name), f"{PARTNERS[kind]}s": beside(kind, entry.name)}
    return {
        what: {
            where: dict(one.options) if isinstance(one, Built) else one.reason
            for where, one in results.items()
        }
        for what, results in found.items()
    }


def _defaults(config: type[Any]) -> dict[str, Any]:
    """Options with their defaults; required ones show their type."""
    try:
        made: dict[str, Any] = config().to_dict()
    except TypeError:
        return {f: "required" for f in config.__dataclass_fields__}
    return made


def _place(place: Path) -> dict[str, Any]:
    """What lies at a place."""
    if place.suffix == ".onnx" and not place.is_dir():
        return {"kind": "graph", "name": place.stem, "file": str(place), **_graph(place)}
    if not place.is_dir():
        return _weights(place)
    if (place / "bundle.json").is_file():
        return _bundle(place)
    return _run(place) if is_run(place) else _saved(place)


def _graph(file: Path) -> dict[str, Any]:
    """Inputs, outputs, nodes and what an export of ours says of itself."""
    from ..export.graph import read_graph

    facts = read_graph(file)
    values = {
        kind: {v.name: f"{v.dtype.lower()} ({', '.join(map(str, v.shape))})" for v in given}
        for kind, given in (("inputs", facts.inputs), ("outputs", facts.outputs))
    }
    told = {key.removeprefix("effformer."): parse_value(v) for key, v in facts.metadata.items()}
    more = {
        key: facts.to_dict()[key] for key in ("weights", "bytes", "opset", "domains", "operators")
    }
    return {**values, **more, **told}


def _weights(file: Path) -> dict[str, Any]:
    """What a file of weights, or all shards of an index, hold; none of the values is read."""
    from ..registry import model
    from ..weights import open_weights

    found = open_weights(file, lazy=True)
    state, kinds = found.tensors, dict[str, int]()
    for x in state.values():
        kind = str(x.dtype).removeprefix("torch.")
        kinds[kind] = kinds.get(kind, 0) + x.numel()
    families = {entry.facts["family"]: entry.build for entry in model}
    return {
        "kind": "weights",
        "name": file.name,
        "entry": found.weights,
        "parameters": sum(kinds.values()),
        "bytes": sum(x.numel() * x.element_size() for x in state.values()),
        "tensors": len(state),
        "numbers": kinds,
        "may be": [
            f"{family} ({layout.name})"
            for family, build in families.items()
            for layout in build.LAYOUTS  # type: ignore[attr-defined]
            if layout.recognise(state)
        ],
        "trained": found.trained,
    }


def _bundle(folder: Path) -> dict[str, Any]:
    from ..export.run import Bundle

    facts = dict(Bundle(folder).facts)
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    return {
        "kind": "bundle",
        "name": facts.pop("model"),
        "folder": str(folder),
        "bytes": size,
        **facts,
    }


def _run(folder: Path) -> dict[str, Any]:
    from ..train import load_run, read_metrics, read_run

    model, step = load_run(folder)
    facts, records = read_run(folder), read_metrics(folder)
    return {
        "kind": "training run",
        "name": model.name,
        "folder": str(folder),
        "state": "finished" if step is None else f"at step {step} of {facts['config']['steps']}",
        "training": facts["config"],
        "objective": facts["objective"],
        "data": facts["data"],
        "last": records[-1] if records else {},
        **_model(model),
    }


def _saved(folder: Path) -> dict[str, Any]:
    from ..io import load_model

    model = load_model(folder)
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    facts = {"kind": "saved model", "name": model.name, "folder": str(folder), "bytes": size}
    transforms = [{"kind": t["kind"], "layers": len(t.get("layers", ()))} for t in model.transforms]
    return facts | _model(model) | {"transforms": transforms}


def _model(model: Any) -> dict[str, Any]:
    from ..flow import trained_of
    from ..profile import count_parameters

    record = trained_of(model)
    return {
        "family": model.FAMILY,
        "parameters": count_parameters(model),
        "layouts": ["effformer", *(layout.name for layout in model.LAYOUTS)],
        "config": model.config.to_dict(),
        "trained": None if record is None else record.to_dict(),
    }


def _text(facts: dict[str, Any]) -> str:
    from ..registry import Caps

    lines = [f"{facts['kind']} {facts['name']}"]
    for key, value in facts.items():
        if key in ("kind", "name") or value in ("", [], {}, None):
            continue
        if key == "caps":
            value = _promises(value) if "works" in facts else str(Caps(**value))
        elif key == "options":
            value = "".join(f"\n    {name}: {words}" for name, words in value.items())
        elif key == "works":
            value = "".join(_partners(what, results) for what, results in value.items())
        elif key in ("parameters", "bytes", "weights"):
            value = f"{value:,}"
        elif isinstance(value, dict):
            value = json.dumps(value, indent=2).replace("\n", "\n  ")
        elif isinstance(value, list):
            value = ", ".join(v if isinstance(v, str) else json.dumps(v) for v in value)
        space = "" if str(value).startswith("\n") else " "
        lines.append(f"  {key}:{space}{value}")
    return "\n".join(lines).replace("`", "")  # marks of docstrings


def _promises(caps: dict[str, Any]) -> str:
    """Masks, positions and the rest, those included that a part refuses."""
    masks = {
        "none": "no masks",
        "key": "masks of keys (B, M)",
        "full": "masks of keys and of pairs (B, 1, N, M)",
    }
    grid = f"needs a grid with the axes {caps['axes']!r}" if caps["axes"] else "needs no grid"
    rotary = "takes rotary tables" if caps["rope"] else "no rotary tables"
    causal = {"never": "never causal", "optional": "causal or not", "always": "always causal"}
    able = {"cross": "a memory", "packed": "packed rows", "streaming": "streaming"}
    rest = [words if caps[key] else f"no {words}" for key, words in able.items()]
    return "; ".join((masks[caps["mask"]], rotary, grid, causal[caps["causal"]], *rest))


def _partners(what: str, results: dict[str, Any]) -> str:
    """One line for what works, one for every reason why something does not."""
    fits = [
        where + "".join(f" ({option}={value!r})" for option, value in one.items())
        for where, one in results.items()
        if isinstance(one, dict)
    ]
    reasons: dict[str, list[str]] = {}
    for where, one in results.items():
        if isinstance(one, str):
            reasons.setdefault(one, []).append(where)
    lines = [f"\n    {what}: {', '.join(fits) or 'none'}"]
    lines += [f"\n      not {', '.join(places)}: {why}" for why, places in reasons.items()]
    return "".join(lines)
