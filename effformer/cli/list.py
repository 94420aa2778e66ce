"""`effformer list`: registered names, by kind and capability."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..checks import unknown
from .common import Json, emit, note, table

if TYPE_CHECKING:
    from ..registry import Entry

_SPELLINGS = {"attn": "attention", "ffns": "ffn", "losses": "loss"}
_RENAMED = {"objective": "loss", "objectives": "losses"}
Flag = Annotated[bool | None, typer.Option(show_default=False)]


def list_parts(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="model, attention, core, ffn, block, width, tokens, loss, sampler, cache, "
            "quantizer, transform or target; without it: all."
        ),
    ] = None,
    like: Annotated[str, typer.Option(help="Glob over names: 'dit*'.")] = "*",
    causal: Annotated[
        bool | None, typer.Option("--causal/--bidirectional", help="Can be causal, or need not be.")
    ] = None,
    cross: Annotated[bool, typer.Option("--cross", help="Attends to another sequence.")] = False,
    joint: Annotated[bool, typer.Option("--joint", help="Works on joined streams.")] = False,
    rope: Annotated[bool, typer.Option("--rope", help="Takes rotary tables.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Takes packed sequences.")] = False,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Has init_state and step.")
    ] = False,
    mask: Annotated[Literal["key", "full"] | None, typer.Option(help="Honours such masks.")] = None,
    cost: Annotated[str | None, typer.Option(help="Growth with tokens: n, 'n log n', n^2.")] = None,
    as_json: Json = False,
) -> None:
    """List what can be built, with filters by capability.

    Examples: `effformer list models --like 'sit*'`, `effformer list attention --causal --mask key`
    """
    flags = {"cross": cross, "joint": joint, "rope": rope, "packed": packed, "streaming": streaming}
    wanted = {k: True for k, v in flags.items() if v} | {
        k: v for k, v in (("causal", causal), ("mask", mask), ("cost", cost)) if v is not None
    }
    found = [
        e
        for e in _entries(kind)
        if fnmatch.fnmatch(e.name, like.lower()) and e.caps.satisfies(**wanted)
    ]
    data = [
        {"kind": e.kind, "name": e.name, "summary": e.summary, "paper": e.paper,
         "aliases": list(e.aliases), "caps": asdict(e.caps)}
        for e in found
    ]  # fmt: skip
    if {e.kind for e in found} == {"model"}:
        sizes = model_sizes()
        data = [one | sizes.get(e.name, {}) for one, e in zip(data, found, strict=True)]
        head = ["name", "parameters", "MACs", "input", "paper"]
        rows = [[e.name, *_size(sizes.get(e.name)), e.paper] for e in found]
    else:
        head = ["name", "kind", "summary", "paper"]
        rows = [[e.name, e.kind, e.summary.replace("`", ""), e.paper] for e in found]
    emit(data, table(head, rows) if rows else "nothing has all of these", as_json)


def model_sizes() -> dict[str, dict[str, Any]]:
    """Parameters, multiply-adds of one sample and shapes of its inputs, of every model of ours, which
    `tools/sizes.py` counts: building all of them takes a minute.
    """
    from importlib.resources import files

    text = (files("effformer.models") / "sizes.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def _size(facts: dict[str, Any] | None) -> tuple[str, str, str]:
    """Cells of a model; nothing of one from another package."""
    if facts is None:
        return "", "", ""
    from ..profile.tables import amount

    first = next(iter(facts["inputs"].values()))
    return amount(facts["parameters"]), amount(facts["macs"]), "x".join(map(str, first))


def _entries(kind: str | None) -> list[Entry]:
    """Entries of a kind; "attention" includes the cores, as `attn=` does."""
    from ..registry import KINDS

    if kind is None:
        return [e for k in KINDS for e in sorted(KINDS[k], key=lambda e: e.name)]
    if kind in _RENAMED:
        note(f"{kind}: the training losses of flows are now listed as {_RENAMED[kind]!r}")
        kind = _RENAMED[kind]
    name = _SPELLINGS.get(kind, kind if kind in KINDS else kind.removesuffix("s"))
    if name not in KINDS:
        raise unknown("kind", kind, [*KINDS], where="list")
    kinds = ("attention", "core") if name == "attention" else (name,)
    return [e for k in kinds for e in sorted(KINDS[k], key=lambda e: e.name)]
