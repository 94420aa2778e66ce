"""Streaming mixers: the cost of a step, wherever it stands, against recomputing the prefix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from markdown import Row, write
from torch import nn

from effformer.config import resolve
from effformer.profile import SideBySide, interleave
from effformer.site import Site

DIM, HEADS, THREADS, RUNS = 256, 4, 1, 51
POSITIONS = (16, 256, 2048, 8192)
PREFIX, IN_A_ROW = 2048, 64
SPECS: dict[str, dict[str, Any]] = {
    "lmu": {"name": "lmu"},
    "flow": {"name": "flow", "causal": True},
}
FLAT, FASTER = 1.25, 1 / 50


def mixer(spec: dict[str, Any]) -> nn.Module:
    config = resolve("attention", spec)
    part: nn.Module = config.build(Site(dim=DIM, heads=HEADS))
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


def run_on(part: Any) -> Callable[[], None]:
    """Many further tokens behind a prefix, one by one."""
    x = tokens(PREFIX + IN_A_ROW)
    _, after = part.step(x[:, :PREFIX], part.init_state(1, like=x))

    def run() -> None:
        state = after
        for token in x[:, PREFIX:].split(1, dim=1):
            _, state = part.step(token, state)

    return run


def cells(measured: SideBySide, name: str, share: float = 1.0) -> tuple[str, str]:
    row, unit = measured.rows[name], 1e6 * share
    return f"{unit * row.median:.0f} µs", f"{unit * row.p10:.0f} to {unit * row.p90:.0f}"


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
        whole = f"{name}, the whole prefix of {PREFIX:,} tokens"
        each = f"{name}, each of {IN_A_ROW} steps behind it"
        one = f"{name}, a single step, run in turns with the prefix"
        step = calls[f"{name}, step at token {PREFIX:,}"]
        turns = {whole: partial(part, tokens(PREFIX)), each: run_on(part)}
        against = interleave(turns, warmup=3, runs=21, threads=THREADS)
        cold = interleave({whole: turns[whole], one: step}, warmup=3, runs=21, threads=THREADS)
        value, spread = cells(against, whole)
        rows.append(Row(what=whole, value=value, spread=spread))
        value, spread = cells(against, each, 1 / IN_A_ROW)
        ratio = against.ratios[each] / IN_A_ROW
        rows.append(Row(what=each, value=value, spread=spread, ratio=ratio, target=FASTER))
        value, spread = cells(cold, one)
        rows.append(
            Row(what=one, value=value, spread=spread, ratio=cold.ratios[one], target=FASTER)
        )
    notes = [
        f"one sequence of width {DIM} ({HEADS} heads for flow), float32; steps are compared with the "
        f"step at token {POSITIONS[0]}",
        "recomputing the prefix is what a mixer without a state would do for every token",
        f"the prefix and {IN_A_ROW} steps take turns, as a stream runs; a single step in turns with the "
        "prefix finds the caches full of it and pays for that alone",
        "both states have a constant size: 256 numbers for lmu, 4 x 64 x 64 and a few for flow",
    ]
    write("streaming", "Streaming, step by step", rows, against.rows[each].machine, notes)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
