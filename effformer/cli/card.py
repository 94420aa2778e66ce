"""`effformer card`: a model card, in Markdown, of a model, a run or a bundle."""

from __future__ import annotations

import json
import time as clock
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import FormatError
from ..files import CARD, README, atomic_path, check_file, mark, read_json
from ..version import VERSION
from .common import Force, Json, Out, Threads, emit, is_run, load, set_threads, stages

if TYPE_CHECKING:
    from effformer.export.opened import Opened

    from ..models.base import Model

LICENCES = {
    "digits": "CC BY 4.0 (UCI Machine Learning Repository, https://doi.org/10.24432/C50P49)"
}
"""Data that come with this package."""
UNKNOWN = "not recorded"
_CONFIG = (
    "shape", "num_classes", "null_label", "value_range", "sampler", "pooling", "normalise", "longest",
    "width", "channels", "vocabulary", "inputs", "outputs",
)  # fmt: skip
"""What a bundle says of itself, as far as its kind has it."""


def card(
    model: Annotated[
        str, typer.Argument(help="Folder of a saved model, a run or a bundle, or a model name.")
    ],
    quality: Annotated[
        Path | None,
        typer.Option(help="What `effformer evaluate -o quality.json` has written of it."),
    ] = None,
    time: Annotated[
        bool, typer.Option("--latency", help="Measure how long it takes on this machine.")
    ] = False,
    threads: Threads = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model card: config, size, multiply-adds, how it was trained and compressed, on which data, how good and
    how fast it is, as far as that is known.

    Prints Markdown; --out writes it. A README.md in the folder of a model or a bundle goes with it, and is replaced
    with it.

    Examples: `effformer card runs/digits`, `effformer card bundle --latency -o bundle/README.md`,
    `effformer card small --quality quality.json -o small/README.md`
    """
    if out is not None:
        if out.suffix != ".md":
            raise ValueError(
                f"card: --out {out}: a card is Markdown; choose a name that ends in .md"
            )
        check_file(out, CARD, force=force)
    set_threads(threads)
    known = None if quality is None else _quality(quality)
    with stages() as stage:
        stage("looking at the model")
        facts = _facts(model, time, threads) | ({} if known is None else {"quality": known})
    text = _text(facts)
    if out is not None:
        with atomic_path(out, CARD, force=force) as temporary:
            temporary.write_text(text, encoding="utf-8")
    emit(
        facts | ({} if out is None else {"saved": str(out)}),
        text if out is None else str(out),
        as_json,
    )


def _facts(source: str, timed: bool, threads: int | None) -> dict[str, Any]:
    place = Path(source)
    if (place / "bundle.json").is_file():
        from ..export import open_bundle

        return _of_bundle(open_bundle(place, threads), timed, threads)
    model = load(source)
    facts = _of_model(model, timed, threads)
    if place.is_dir():
        home = place / "model" if (place / "model").is_dir() else place
        facts["size"]["bytes"] = _bytes(home)
        facts["training"] = _training(place)
    return facts


def _of_model(model: Model, timed: bool, threads: int | None) -> dict[str, Any]:
    from ..flow import trained_of
    from ..profile import count_parameters, latency, machine, profile
    from ..registry import model as models

    entry = models.get(model.name) if model.name in models else None
    inputs, record = model.example_inputs(1), trained_of(model)
    kinds = sorted({str(x.dtype).removeprefix("torch.") for x in model.state_dict().values()})
    facts: dict[str, Any] = {
        "name": model.name, "kind": "model", "family": model.FAMILY, "effformer": VERSION,
        "summary": "" if entry is None else entry.summary,
        "paper": "" if entry is None else entry.paper,
        "published": {} if entry is None else {
            key: entry.facts[key] for key in ("source", "licence") if entry.facts.get(key)
        },
        "size": {
            "parameters": count_parameters(model),
            "multiply-adds of one sample": int(profile(model, inputs, memory=False).total),
            "inputs of one sample": {name: list(x.shape) for name, x in inputs.items()},
            "numbers": kinds,
        },
        "config": model.config.to_dict(),
        "weights": "random" if model.drawn else "compressed" if model.transforms else "trained",
        "transforms": [_transform(one) for one in model.transforms],
        "trained": None if record is None else record.to_dict(),
    }  # fmt: skip
    if timed:
        wall = latency(model, inputs, threads=threads)
        facts["latency"] = {
            "seconds of one sample": wall.median, "of runs": wall.runs, "threads": wall.threads,
            "machine": str(machine()),
        }  # fmt: skip
    return facts


def _transform(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of a change, without its long lists."""
    short = {key: value for key, value in record.items() if len(json.dumps(value)) <= 120}
    long = {key: f"{len(value)} entries" for key, value in record.items() if key not in short}
    return short | long


def _training(place: Path) -> dict[str, Any]:
    """What a run says of its training; of a saved model, the run in whose folder it lies."""
    from ..train import read_metrics, read_run

    home = place if is_run(place) else place.resolve().parent
    if not is_run(home) or (home != place and place.resolve().name != "model"):
        return {}
    facts, records = read_run(home), read_metrics(home)
    call = (facts.get("about") or {}).get("call")
    data = call.get("data") if isinstance(call, dict) else None
    return {
        "data": data or UNKNOWN, "licence of the data": LICENCES.get(str(data), UNKNOWN),
        **{f"data: {key}": value for key, value in (facts.get("data") or {}).items()},
        "config": facts.get("config"), "objective": facts.get("objective"),
        "last record": records[-1] if records else {},
    }  # fmt: skip


def _of_bundle(bundle: Opened, timed: bool, threads: int | None) -> dict[str, Any]:
    facts = bundle.facts
    forms = facts.get("forms") or {facts.get("quantization") or "float32": facts["graphs"]}
    made: dict[str, Any] = {
        "name": str(facts.get("model")), "kind": "edge bundle", "family": "", "effformer": str(facts.get("effformer")),
        "size": {
            "bytes": _bytes(bundle.folder),
            **{f"bytes as {form}": facts["files"][_main(own)]["bytes"] for form, own in forms.items()},
        },
        "config": {key: facts[key] for key in _CONFIG if key in facts},
        "session": facts.get("session"),
        "trained": facts.get("trained"),
        "check": {"differs from its record by": bundle.self_test(), "runs here": bundle.which()},
    }  # fmt: skip
    if timed:
        from ..profile import machine

        bundle.example()
        start = clock.perf_counter()
        bundle.example()
        made["latency"] = {
            "seconds of one sample": clock.perf_counter() - start,
            "steps": facts.get("sampler", {}).get("steps"),
            "threads": threads or facts.get("session", {}).get("threads"), "machine": str(machine()),
        }  # fmt: skip
    return made


def _main(graphs: Mapping[str, Any]) -> str:
    """The file of the graph that a bundle is about."""
    return str(next(graphs[name] for name in ("velocity", "encoder", "step") if name in graphs))


def _bytes(folder: Path) -> int:
    """Size of what a verb wrote there: the card itself and what a runner remembers are none of it."""
    files = (p for p in folder.iterdir() if p.is_file() and p.name not in (README, "choice.json"))
    return sum(p.stat().st_size for p in files)


def _quality(path: Path) -> dict[str, Any]:
    """What `evaluate` has written.

    Raises:
        FormatError: something else.
    """
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("generator") != mark("quality"):
        raise FormatError(
            f"card: --quality {path}: is not what `effformer evaluate -o quality.json` writes"
        )
    return {key: facts[key] for key in facts if key not in ("generator", "confusion", "classes")}


def _text(facts: Mapping[str, Any]) -> str:
    """The card in Markdown, behind the fields that model hubs read."""
    tags = [tag for tag in (facts["family"], facts["kind"]) if tag]
    training, published = facts.get("training") or {}, facts.get("published") or {}
    head = ["---", "library_name: effformer", f"tags: {json.dumps(tags)}"]
    if training.get("data", UNKNOWN) != UNKNOWN:
        head.append(f"datasets: {json.dumps([training['data']])}")
    weights = f"A model with {facts.get('weights')} weights"
    kind = weights if facts["kind"] == "model" else "An edge bundle"
    body = [f"# {_cell(facts['name'])}", f"{kind}, of effformer {facts['effformer']}."]
    body += [words for words in (facts.get("summary"), _paper(facts)) if words]
    body += _section("Size", facts["size"])
    body += _section("Quality", facts.get("quality"), "Not measured; `effformer evaluate` does.")
    body += _section("Latency", facts.get("latency"), "Not measured; `--latency` does.")
    body += _section("Check on the machine where the card was written", facts.get("check"))
    if changes := facts.get("transforms"):
        body += ["## Changes since it was built", "\n".join(f"- {_cell(one)}" for one in changes)]
    body += _section("Training", training, "No record of the training lies beside the weights.")
    body += _section("Published weights of this configuration", published)
    body += ["## Configuration", _fenced(facts["config"])]
    for title, key in (
        ("What the weights were trained to predict", "trained"),
        ("Options of the runtime", "session"),
    ):
        body += [f"## {title}", _fenced(facts[key])] if facts.get(key) else []
    return "\n".join([*head, "---", ""]) + "\n\n".join([*body, f"<!-- {mark(CARD)} -->"]) + "\n"


def _paper(facts: Mapping[str, Any]) -> str:
    return f"Paper: arXiv {facts['paper']}." if facts.get("paper") else ""


def _section(title: str, values: Mapping[str, Any] | None, otherwise: str = "") -> list[str]:
    rows = {key: value for key, value in (values or {}).items() if value not in (None, "", {}, [])}
    if rows:
        return [f"## {title}", _table(rows)]
    return [f"## {title}", otherwise] if otherwise else []


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        words = value if isinstance(value, str) else json.dumps(value)
        return " ".join(words.replace("|", "\\|").split())
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _fenced(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=2)}\n```"
