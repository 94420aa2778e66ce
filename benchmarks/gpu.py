"""Attention on a CUDA device: linear cores against torch's fused softmax attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median

import torch
from markdown import Row, write
from torch import Tensor

from effformer.attention import Attention
from effformer.config import resolve
from effformer.profile import machine
from effformer.site import Site

NAMES = ("softmax", "flow", "sana", "linear", "gla", "gated-delta")
HEADS, WIDTH, TOKENS, ROUNDS = 12, 64, (4096, 16384, 65536), 7


def candidate(name: str, tokens: int) -> Callable[[], Tensor]:
    """The whole attention, projections included, in bfloat16."""
    mixer = resolve("attention", name).build(Site(dim=HEADS * WIDTH, heads=HEADS))
    assert isinstance(mixer, Attention)
    mixer.eval().to("cuda", torch.bfloat16)
    x = torch.randn(1, tokens, HEADS * WIDTH, device="cuda", dtype=torch.bfloat16)
    return lambda: mixer(x)


def milliseconds(call: Callable[[], Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def rows_of(tokens: int) -> list[Row]:
    calls = {name: candidate(name, tokens) for name in NAMES}
    with torch.inference_mode():
        for call in calls.values():
            milliseconds(call)
        found = [{n: milliseconds(call) for n, call in calls.items()} for _ in range(ROUNDS)]
    rows = []
    for name in NAMES:
        times = sorted(turn[name] for turn in found)
        ratio = median(turn[name] / turn["softmax"] for turn in found)
        rows.append(
            Row(
                what=f"{name}, {tokens:,} tokens",
                value=f"{median(times):.4g} ms",
                spread=f"{times[0]:.4g} to {times[-1]:.4g}",
                ratio=None if name == "softmax" else ratio,
            )
        )
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: needs a CUDA device")
    rows = [row for tokens in TOKENS for row in rows_of(tokens)]
    notes = [
        f"{torch.cuda.get_device_name()}; one attention of {HEADS} heads of {WIDTH}, both ways, "
        "projections included, batch 1, bfloat16, eager, no gradients",
        "ratio: against softmax (torch's fused operator) in the same round; spread is the whole range",
    ]
    write("gpu", "Attention on a CUDA device", rows, machine(), notes)


if __name__ == "__main__":
    main()
