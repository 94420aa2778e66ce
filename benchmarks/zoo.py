"""Every attention of the zoo as one layer, from 256 to 16,384 tokens: time, memory, work, state.

Writes ``benchmarks/results/zoo.csv``, one line for every form and length, and the picture of the
README.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from markdown import Row, write
from torch import Tensor, nn

from effformer import registry
from effformer.blocks.stack import with_causal
from effformer.build import list_attention
from effformer.calls import outputs
from effformer.config import resolve
from effformer.context import Context
from effformer.files import atomic_path
from effformer.profile import count_parameters, machine, peak_memory
from effformer.profile.plots import Curves
from effformer.profile.sweep import crossover
from effformer.site import Site

DIM, HEADS = 384, 6
TOKENS, SMALL_TOKENS = (256, 1024, 4096, 16384), (64, 256)
RUNS, PATIENCE, LIMIT = 5, 5.0, 1500.0
"""Calls that are timed, fewer where they would take more than so many seconds; a form that takes more
than so many milliseconds at a length is not measured at greater ones.
"""
HYBRID = ("gated-delta", "softmax", 3)
MIXES = ("flow", "sana", "retention", "gated-delta")
"""Attentions that also stand in the table in turns with softmax, ``layers="1:1"``."""
MASKS = ("none", "key", "full")
SHOWN = ("softmax", "flow", "sana", "gated-delta", "gated-delta 3:1 softmax")
RESULTS = Path(__file__).parent / "results"
TABLE = RESULTS / "zoo.csv"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "attentions.svg"


@dataclass(frozen=True, kw_only=True, order=True)
class Form:
    """What a line of the table is about.

    Attributes:
        attn: what ``attn=`` takes.
        layers: what ``layers=`` takes, empty where all layers are alike.
        causal: the form that sees no later tokens.
    """

    attn: str
    layers: str = ""
    causal: bool = False

    def __str__(self) -> str:
        mixed = f" {self.layers} softmax" if self.layers else ""
        return f"{self.attn}{mixed}{', causal' if self.causal else ''}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One form at one length.

    Attributes:
        attn: what ``attn=`` takes.
        layers: what ``layers=`` takes, empty where all layers are alike.
        causal: the form that sees no later tokens.
        tokens: length, a square grid where there is a grid.
        milliseconds: CPU time of one forward on one thread, median.
        memory: bytes of activations at their peak.
        macs: multiply-adds, projections included.
        parameters: of the layer.
        state: bytes carried from token to token after so many, empty where it cannot stream.
        vit_accuracy: what ``zoo_quality.py`` found of the form, as is what stands below.
    """

    attn: str
    layers: str = ""
    causal: bool
    tokens: int
    milliseconds: float
    memory: int
    macs: int | str
    parameters: int
    state: int | str
    cost: str
    masks: str
    rotary: bool
    cross: bool
    streaming: bool
    packed: bool
    paper: str
    vit_accuracy: str = ""
    dit_distance: str = ""
    recall: str = ""
    onnx_nodes: str = ""


QUALITY = tuple(field.name for field in fields(Line))[-4:]


def forms(only: Sequence[str]) -> list[tuple[str, bool]]:
    """Names with each of their forms."""
    found = []
    for name in list_attention():
        if name == "multihead" or (only and name not in only):
            continue
        caps = registry.attention.get(name).caps
        found += [(name, c) for c in (False, True) if caps.satisfies(causal=c)]
    return found


def build(name: str, causal: bool, tokens: int, *, dim: int = DIM, heads: int = HEADS) -> nn.Module:
    asked = {"linformer": {"tokens": tokens}, "tdsm": {"tokens": tokens}}
    config = with_causal(resolve("attention", {"name": name, **asked.get(name, {})}), causal)
    side = math.isqrt(tokens)
    site = Site(dim=dim, heads=heads, time_dim=dim, grid=(side, side))
    made: nn.Module = config.build(site)
    return made.eval()


class Hybrid(nn.Module):
    """So many layers of one attention and then one of another."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        name, other, count = HYBRID
        names = [name] * count + [other]
        self.layers = nn.ModuleList(build(n, False, tokens) for n in names)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        for layer in self.layers:
            x = layer(x, ctx)
        return x


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of CPU time, median over some calls after one that is not counted."""
    call()
    spent: list[float] = []
    while len(spent) < RUNS and (not spent or sum(spent) + spent[-1] < PATIENCE):
        start = process_time()
        call()
        spent.append(process_time() - start)
    return 1e3 * median(spent)


def state_of(mixer: Any, x: Tensor) -> int | str:
    """Bytes of the state after the tokens of x."""
    try:
        _, state = mixer.step(x, mixer.init_state(1, like=x), Context())
    except (NotImplementedError, ValueError):
        return ""
    return sum(s.numel() * s.element_size() for s in outputs(state) if isinstance(s, Tensor))


def inputs(tokens: int) -> tuple[Tensor, Context]:
    generator = torch.Generator().manual_seed(0)
    side = math.isqrt(tokens)
    ctx = Context(grid=(side, side), time=torch.zeros(1, DIM))
    return torch.randn(1, tokens, DIM, generator=generator), ctx


def measure(name: str, causal: bool, tokens: int) -> Line:
    (x, ctx), caps = inputs(tokens), registry.attention.get(name).caps
    mixer = build(name, causal, tokens)
    streams = caps.streaming and causal
    try:
        macs: int | str = mixer.macs(tokens)  # type: ignore[operator]
    except (TypeError, ValueError):
        macs = ""
    return Line(
        attn=name, causal=causal, tokens=tokens, milliseconds=round(timed(lambda: mixer(x, ctx)), 3),
        memory=peak_memory(lambda: mixer(x, ctx), [x, *mixer.parameters()]), macs=macs,
        parameters=count_parameters(mixer), state=state_of(mixer, x) if streams else "",
        cost=caps.cost, masks=caps.mask, rotary=caps.rope, cross=caps.cross,
        streaming=caps.streaming, packed=caps.packed,
        paper=registry.attention.get(name).paper,
    )  # fmt: skip


def hybrid(tokens: int) -> float:
    """Milliseconds of one layer of the hybrid, on average."""
    (x, ctx), layers = inputs(tokens), Hybrid(tokens)
    return timed(lambda: layers(x, ctx)) / len(layers.layers)


def picture(found: dict[str, dict[int, float]]) -> None:
    """Time against tokens, and where each line crosses that of softmax."""
    lines = {}
    for name in SHOWN:
        points = sorted(found[name].items())
        at = crossover(found["softmax"], found[name])
        where = "at all of these" if at == min(found[name]) else f"from {at or 0:,.0f} tokens"
        words = f"{name}, faster {where}" if at and name != "softmax" else name
        lines[words] = points
    Curves(lines, "tokens", f"ms for one layer of {HEADS} heads of 64", log=True).save(
        PICTURE, force=True
    )


def rows(lines: Sequence[Line]) -> list[Row]:
    """One line a form: time at the largest length, and its ratio to softmax."""
    longest = max(line.tokens for line in lines)
    base = {
        line.causal: line.milliseconds
        for line in lines
        if line.attn == "softmax" and line.tokens == longest
    }
    return [
        Row(
            what=f"{line.attn}{', causal' if line.causal else ''}: {line.tokens} tokens",
            value=f"{line.milliseconds:.4g} ms",
            ratio=line.milliseconds / base[line.causal] if line.causal in base else None,
        )
        for line in sorted(lines, key=lambda line: line.milliseconds)
        if line.tokens == longest
    ]  # fmt: skip


def main(*, small: bool = False, only: Sequence[str] = ()) -> None:
    torch.set_num_threads(1)
    sizes, lines, here = SMALL_TOKENS if small else TOKENS, [], machine()
    chosen = only or (("softmax", "flow", "sana", "gated-delta") if small else ())
    with torch.inference_mode():
        for name, causal in forms(chosen):
            for tokens in sizes:
                try:
                    line = measure(name, causal, tokens)
                except ValueError as error:
                    print(f"{name} at {tokens} tokens: {error}", file=sys.stderr)
                    continue
                lines.append(line)
                print(f"{name:24} {tokens:6} {line.milliseconds:10.2f} ms", file=sys.stderr)
                if line.milliseconds > LIMIT:
                    break
        mixed = {n: hybrid(n) for n in sizes}
    keep = not small and not only
    if keep:
        plain = [{k: str(v) for k, v in asdict(line).items()} for line in lines]
        save(TABLE, plain + mixes(plain), needed(load(TABLE)))
        found = {
            name: {x.tokens: x.milliseconds for x in lines if x.attn == name and not x.causal}
            for name in SHOWN
        }
        picture({**found, SHOWN[-1]: mixed})
    write("zoo", "One attention layer", rows(lines), here, _notes(mixed), keep=keep)


def load(path: Path) -> list[dict[str, str]]:
    """Lines of a table, of which those of hybrids are made anew."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        lines = [{"layers": "", **line} for line in csv.DictReader(file)]
    plain = [line for line in lines if not line["layers"]]
    kept = {_key(line): line for line in lines}
    return plain + [
        {**line, **{name: kept[_key(line)][name] for name in QUALITY}}
        if _key(line) in kept
        else line
        for line in mixes(plain)
    ]


def _key(line: Mapping[str, str]) -> tuple[str, ...]:
    return line["attn"], line["layers"], str(line["causal"]), str(line["tokens"])


def mixes(lines: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Hybrids of as many layers of softmax: a layer on average, what both can do."""
    found = {_key(line): line for line in lines}
    made = []
    for (name, layers, *rest), line in found.items():
        other = found.get(("softmax", layers, *rest))
        if name not in MIXES or other is None:
            continue
        means = {
            k: f"{(float(line[k]) + float(other[k])) / 2:.10g}"
            for k in ("milliseconds", "macs", "parameters", "state")
            if line[k] and other[k]
        }
        both = {
            k: str(line[k] == other[k] == "True")
            for k in ("rotary", "cross", "streaming", "packed")
        }
        most = str(max(int(line["memory"]), int(other["memory"])))
        masks = min(line["masks"], other["masks"], key=MASKS.index)
        clear = dict.fromkeys(("state", *QUALITY), "")
        made.append(
            {**line, **clear, **means, **both, "layers": "1:1", "memory": most, "masks": masks, "cost": other["cost"]}
        )  # fmt: skip
    return made


def needed(lines: Sequence[Mapping[str, str]]) -> dict[Form, dict[str, str]]:
    """What is known of the quality of every form."""
    return {
        Form(attn=line["attn"], layers=line["layers"], causal=line["causal"] == "True"): {
            name: line.get(name) or "" for name in QUALITY
        }
        for line in lines
    }


def save(
    path: Path, lines: Sequence[Mapping[str, str]], found: Mapping[Form, Mapping[str, str]]
) -> None:
    """Write a table with what was found of its forms."""
    with atomic_path(path) as place, place.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [f.name for f in fields(Line)], lineterminator="\n")
        table.writeheader()
        for line in lines:
            form = Form(attn=line["attn"], layers=line["layers"], causal=line["causal"] == "True")
            table.writerow({**line, **found.get(form, {})})


def _notes(mixed: dict[int, float]) -> list[str]:
    name, other, count = HYBRID
    times = ", ".join(f"{n:,} tokens {ms:.4g} ms" for n, ms in mixed.items())
    return [
        f"width {DIM}, {HEADS} heads of 64, projections included, batch 1, float32, eager, no gradients; "
        "ratio: time over that of softmax of the same direction",
        f"all lengths, memory, work and states: `zoo.csv`; {count} layers of {name} to one of {other}, "
        f"per layer: {times}",
        f"forms that take more than {LIMIT / 1e3:g} s at some length were not measured beyond it",
        "time is CPU time of one thread, so that other work on the machine counts for little",
    ]


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(small="--small" in sys.argv[1:], only=words)
