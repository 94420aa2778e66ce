"""TarFlow trained on digits, inverted token by token against many tokens at once.

Usage: python benchmarks/token_flows.py [--small]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from markdown import Row, write
from torch import Tensor

import effformer
from effformer.flow import Inversion, bits_per_dim, contractions, inversion_plan, invert
from effformer.profile import interleave
from effformer.train import Generation, TrainConfig, load_data, train

SMALL = "--small" in sys.argv
THREADS, STEPS, RUNS, SAMPLES = 1, *((3, 1, 1) if SMALL else (500, 5, 4))
NOISE, TOLERANCE, SEGMENT = 0.1, 1e-5, 32
BATCHES = (1,) if SMALL else (1, 8)
AIM, EQUAL = 0.33, 1e-4


def trained() -> tuple[Any, Any, float]:
    """A model of 64 tokens, the data, and bits per number of held-out ones."""
    torch.manual_seed(0)
    data, held = load_data("digits").split(0.1, seed=0)
    model = effformer.build_model(
        "tarflow-tiny", dim=64, heads=2, depth=8, flows=(2,) * 4, input_size=8, channels=1,
        patch=2 if SMALL else 1, num_classes=10,
    )  # fmt: skip
    goal = Generation(loss={"name": "likelihood", "noise": NOISE})
    train(model, data, goal, TrainConfig(steps=STEPS, batch=32, lr=2e-3, warmup=min(30, STEPS)))
    model.eval()
    x = held["x"] + NOISE * torch.randn(held["x"].shape)
    with torch.no_grad():
        return model, data, float(bits_per_dim(model, x, levels=17, y=held["y"]).mean())


def each(model: Any, z: Tensor, y: Tensor, batch: int, how: Any) -> Tensor:
    """All samples, ``batch`` at a time."""
    pairs = zip(z.split(batch), y.split(batch), strict=True)
    return torch.cat([invert(model, a, how, y=b).x for a, b in pairs])


def main() -> None:
    model, data, bits = trained()
    plan = inversion_plan(
        contractions(model, data["x"][:256]), segment=SEGMENT, iterations=SEGMENT, elsewhere=64,
        tolerance=TOLERANCE,
    )  # fmt: skip
    ways = {
        "token by token": Inversion(),
        "Jacobi, all 64 tokens at once": Inversion(segment=None, tolerance=TOLERANCE),
        f"GS-Jacobi, segments of {SEGMENT} in the slowest map": plan,
        f"GS-Jacobi, segments of {SEGMENT} everywhere": Inversion(
            segment=SEGMENT, tolerance=TOLERANCE
        ),
    }
    rows: list[Row] = []
    notes = [
        f"TarFlow of 4 maps of 2 blocks, width 64, patches of one pixel, after {STEPS} steps of 32 digits "
        f"with noise {NOISE}: {bits:.2f} bits per number of held-out digits (17 levels)",
        f"iterations end at a change of {TOLERANCE:g}; every result is the sequential one to {EQUAL:g}",
    ]
    for batch in BATCHES:
        count = SAMPLES if batch == 1 else batch
        z = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        y = torch.arange(count) % 10
        exact = each(model, z, y, batch, None)
        calls: dict[str, Callable[[], object]] = {}
        for title, how in ways.items():
            off = float((each(model, z, y, batch, how) - exact).abs().max())
            assert SMALL or off <= EQUAL, f"{title}: {off}"
            name = f"batch {batch}, {title}"
            calls[name] = partial(each, model, z, y, batch, how)
            evaluations = sum(map(sum, invert(model, z[:batch], how, y=y[:batch]).iterations))
            notes.append(f"{name}: {evaluations} evaluations of 4 maps, difference {off:.0e}")
        measured = interleave(calls, warmup=1, runs=RUNS, threads=THREADS)
        for i, name in enumerate(calls):
            row, unit = measured.rows[name], 1e3 * batch / count
            rows.append(
                Row(
                    what=name,
                    value=f"{unit * row.median:.0f} ms",
                    spread=f"{unit * row.p10:.0f} to {unit * row.p90:.0f}",
                    ratio=measured.ratios[name] if i else None,
                    target=AIM if i and batch == 1 else None,
                )
            )
    machine = next(iter(measured.rows.values())).machine
    write("token_flows", "Inversion of a flow of tokens", rows, machine, notes, keep=not SMALL)


if __name__ == "__main__":
    main()
