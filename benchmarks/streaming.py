"""Streaming mixers: the cost of a step, wherever it stands, against recomputing the prefix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from markdown import Row, write
from torch import nn

from effformer import registry
from effformer.config import resolve
from effformer.context import Site
from effformer.profile import SideBySide, interleave

DIM, HEADS, THREADS, RUNS = 256, 4, 1, 51
POSITIONS = (16, 256, 2048, 8192)
PREFIX = 2048
SPECS: dict[str, dict[str, Any]] = {
    "lmu": {"name": "lmu"},
    "flow": {"name": "flow", "causal": True},
}
FLAT, FASTER = 1.25, 1 / 50


def mixer(spec: dict[str, Any]) -> nn.Module:
    config = resolve("attention", spec)
    entry = registry.attention.owner(config)
    assert entry is not None
    part: nn.Module = entry.build(config, Site(dim=DIM, heads=HEADS))
    return part.eval()


def tokens(n: int) -> torch.Tensor:
    return torch.randn(1, n, DIM, generator=torch.Generator().manual_seed(0))


def steps(part: Any) -> dict[int, Callable[[], object]]:
    """One further token after so many, from the state that they left."""
    x = tokens(max(POSITIONS))
    calls: dict[int, Callable[[], object]] = {}
    done = 0
    state = part.init_state(1, like=x)
    for position in POSITIONS:
        _, state = part.step(x[:, done:position], state)
        calls[position], done = partial(part.step, x[:, :1], state), position
    return calls


def cells(measured: SideBySide, name: str) -> tuple[str, str]:
    row = measured.rows[name]
    return f"{1e6 * row.median:.0f} µs", f"{1e6 * row.p10:.0f} to {1e6 * row.p90:.0f}"


def main() -> None:
    rows: list[Row] = []
    for name, spec in SPECS.items():
        part = mixer(spec)
        calls = {f"{name}, step at token {p:,}": call for p, call in steps(part).items()}
        flat = interleave(calls, warmup=20, runs=RUNS, threads=THREADS)
        for i, what in enumerate(calls):
            value, spread = cells(flat, what)
            ratio = flat.ratios[what] if i else None
            rows.append(
                Row(what=what, value=value, spread=spread, ratio=ratio, target=ratio and FLAT)
            )
        last = f"{name}, step at token {PREFIX:,}"
        whole = f"{name}, the whole prefix of {PREFIX:,} tokens"
        both = {whole: partial(part, tokens(PREFIX)), last: calls[last]}
        against = interleave(both, warmup=3, runs=21, threads=THREADS)
        for what in (whole, last):
            value, spread = cells(against, what)
            ratio = against.ratios[what] if what == last else None
            shown = f"{what}, against the prefix" if what == last else what
            rows.append(
                Row(what=shown, value=value, spread=spread, ratio=ratio, target=ratio and FASTER)
            )
    notes = [
        f"one sequence of width {DIM} ({HEADS} heads for flow), float32; steps are compared with the "
        f"step at token {POSITIONS[0]}",
        "recomputing the prefix is what a mixer without a state would do for every token",
        "against the prefix the step is slower than alone: the prefix, run in turns with it, has driven "
        "its weights from the cache",
        "both states have a constant size: 256 numbers for lmu, 4 x 64 x 64 and a few for flow",
    ]
    write("streaming", "Streaming, step by step", rows, against.rows[last].machine, notes)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
