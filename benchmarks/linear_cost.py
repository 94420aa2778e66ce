"""Mixers that claim a cost linear in tokens: four times the tokens, at most five times the time."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from cpu_time import Turns, take_turns
from markdown import Row, write
from torch import Tensor, nn

from effformer import registry
from effformer.attention import Attention
from effformer.blocks.stack import with_causal
from effformer.build import list_attention
from effformer.config import resolve
from effformer.context import Context
from effformer.site import Site

HEADS, WIDTH, FACTOR, AIM = 4, 64, 4, 5.0
TOKENS, RUNS = (4096, 16384), 5
SMALL_TOKENS, SMALL_RUNS = (64, 256), 1
CLAIMS = {"n": AIM, "n log n": None}


def forms() -> list[tuple[str, bool]]:
    """Names with a claim, in every form that they have."""
    found = []
    for name in list_attention():
        caps = registry.attention.get(name).caps
        if caps.cost in CLAIMS:
            found += [(name, c) for c in (False, True) if caps.satisfies(causal=c)]
    return found


def build(name: str, causal: bool, tokens: int) -> nn.Module:
    options: dict[str, Any] = {"tokens": tokens} if name == "linformer" else {}
    config = with_causal(resolve("attention", {"name": name, **options}), causal)
    mixer: nn.Module = config.build(Site(dim=HEADS * WIDTH, heads=HEADS))
    return mixer.eval()


def call(mixer: nn.Module, tokens: int) -> Callable[[], Tensor]:
    """The mixer on so many tokens. Of a multi-head attention the core alone: its projections are
    linear anyway.
    """
    generator = torch.Generator().manual_seed(0)
    side = math.isqrt(tokens)
    context = Context(
        grid=(side, side) if side * side == tokens else (2, side, tokens // side // 2)
    )
    if not isinstance(mixer, Attention):
        x = torch.randn(1, tokens, HEADS * WIDTH, generator=generator)
        return lambda: mixer(x, context)
    x = torch.randn(1, tokens, 3, HEADS, WIDTH, generator=generator)
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)  # as a fused projection leaves them
    further = {
        name: torch.randn(1, HEADS, tokens, i.width, generator=generator)
        for name, i in mixer.config.core.inputs(WIDTH, WIDTH).items()
    }
    return lambda: mixer.core(q, k, v, context, **further)


def growth(name: str, causal: bool, sizes: tuple[int, int], runs: int) -> Turns:
    mixer = build(name, causal, sizes[1])
    return take_turns({str(n): call(mixer, n) for n in sizes}, runs=runs)


def row(name: str, causal: bool, claim: str, found: Turns) -> Row:
    few, many = found.seconds
    return Row(
        what=f"{name}{', causal' if causal else ''} ({claim}): {few} to {many} tokens",
        value=f"{found.median(few)} to {found.median(many)}",
        spread=found.spread(many),
        ratio=found.ratio(many),
        target=CLAIMS[claim],
    )


def main(*, small: bool = False, only: str = "") -> None:
    sizes, runs = (SMALL_TOKENS, SMALL_RUNS) if small else (TOKENS, RUNS)
    rows = []
    for name, causal in forms():
        if only and name != only:
            continue
        found = growth(name, causal, sizes, runs)
        rows.append(row(name, causal, registry.attention.get(name).caps.cost, found))
    notes = [
        f"{HEADS} heads of {WIDTH}, batch 1, float32, eager, no gradients; ratio: time with "
        f"{FACTOR} times the tokens over time, in the same round",
        "of a multi-head attention the core alone is timed, on heads cut from one fused projection; "
        "the projections are linear and would hide its growth",
        "n log n claims nothing here, and is listed for comparison",
        "a quadratic mixer would show 16",
        "time is CPU time of one thread, so that other work on the machine counts for little",
    ]
    write(
        "linear_cost",
        "Cost linear in tokens",
        rows,
        found.machine,
        notes,
        keep=not small and not only,
    )


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(small="--small" in sys.argv[1:], only=(words or [""])[0])
