"""What rotary positions cost: every core that takes them, with tables and without."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from cpu_time import Turns, take_turns
from markdown import Row, write
from torch import Tensor

from effformer import registry
from effformer.attention import Attention
from effformer.config import resolve
from effformer.context import EMPTY
from effformer.nn.positions import cell_counts, grid_positions
from effformer.nn.rope import GridRope
from effformer.site import Site

HEADS, WIDTH, AIM = 12, 64, 1.25
SIDES, RUNS = (32, 64), 15
SMALL_SIDES, SMALL_RUNS = (8,), 1


def calls(name: str, side: int) -> dict[str, Callable[[], Tensor]]:
    """The core on the cells of a square grid, plain and with the rotary tables of its places."""
    options: dict[str, Any] = {"tokens": side * side} if name == "linformer" else {}
    mixer = resolve("attention", {"name": name, **options}).build(
        Site(dim=HEADS * WIDTH, heads=HEADS)
    )
    assert isinstance(mixer, Attention)
    mixer.eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, side * side, 3, HEADS, WIDTH, generator=generator)
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)  # as a fused projection leaves them
    rope = GridRope(GridRope.Config(), WIDTH, heads=HEADS, depth=1)
    places = grid_positions(cell_counts((side, side), device=torch.device("cpu")))
    (tables,) = rope(places, like=x)
    ctx = replace(EMPTY, rope=tables)

    def turned() -> Tensor:
        if mixer.core.rotates == "qk":
            return mixer.core(tables.query(q), tables.key(k), v)
        return mixer.core(q, k, v, ctx)

    return {"plain": lambda: mixer.core(q, k, v), "rotary": turned}


def row(name: str, side: int, found: Turns) -> Row:
    return Row(
        what=f"{name}, {side * side:,} tokens",
        value=f"{found.median('plain')} to {found.median('rotary')}",
        spread=found.spread("rotary"),
        ratio=found.ratio("rotary"),
        target=AIM,
    )


def main(*, small: bool = False) -> None:
    sides, runs = (SMALL_SIDES, SMALL_RUNS) if small else (SIDES, RUNS)
    rows = []
    for entry in registry.core:
        if entry.caps.rope:
            for side in sides:
                found = take_turns(calls(entry.name, side), runs=runs)
                rows.append(row(entry.name, side, found))
    notes = [
        f"{HEADS} heads of {WIDTH}, batch 1, float32, eager, no gradients; the core alone, on heads "
        "cut from one fused projection; ratio: time with tables over time without, in the same round",
        "time is CPU time of one thread, so that other work on the machine counts for little",
    ]
    write("rotary", "The cost of rotary positions", rows, found.machine, notes, keep=not small)


if __name__ == "__main__":
    main(small="--small" in sys.argv[1:])
