"""DyDiT-B/2 that executes half of its multiply-adds against the dense DiT-B/2: does skipping pay?

Usage: python benchmarks/dynamic_width.py [THREADS]
"""

from __future__ import annotations

import sys
from functools import partial
from statistics import median
from typing import Any

import torch
from markdown import Row, write
from torch import Tensor, nn

import effformer
from effformer.profile import interleave, profile

THREADS = int(sys.argv[1]) if sys.argv[1:] and sys.argv[1].isdigit() else 1
RUNS = {1: 15, 8: 7}
"""Batch -> timed rounds."""
AIM = 0.62


def dense() -> nn.Module:
    model = effformer.build_model("dit-b").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)  # nothing is zero, as in a trained model
    return model


@torch.no_grad()
def skipping(
    model: nn.Module,
    inputs: dict[str, Tensor],
    *,
    heads: int,
    groups: int,
    tokens: float,
    name: str = "dydit-b",
) -> nn.Module:
    """The dynamic model with the weights of a dense one and gates set to shares of the work.

    Args:
        model: the dense one.
        inputs: on which the share of tokens is met.
        heads: active heads, spread evenly over all.
        groups: active groups of channels, likewise.
        tokens: share of the tokens that reach the FFN.
        name: of the dynamic model.
    """
    made: Any = effformer.build_model(name)
    effformer.load_weights(made, model.state_dict())
    for block in made.blocks:
        for name, active in (("attn", heads), ("ffn", groups)):
            router = block.width.gates[name].router
            units = router.out_features + 1
            spread = (torch.arange(units) * active) % units < active
            router.weight.zero_()
            router.bias.copy_(torch.where(spread[1:], 1.0, -1.0))
        block.tokens.gates["ffn"].register_forward_pre_hook(partial(_meet, tokens))
    made.eval()(**inputs)
    for block in made.blocks:
        block.tokens.gates["ffn"]._forward_pre_hooks.clear()
    return made


def _meet(share: float, gate: Any, args: tuple[Any, ...]) -> None:
    """Set the bias of a gate so that it keeps a share of the tokens at hand."""
    gate.fc2.bias.zero_()
    logits = gate.fc2(torch.relu(gate.fc1(args[0]))).flatten()
    gate.fc2.bias.fill_(-float(logits.quantile(1 - share)))


def main() -> None:
    torch.manual_seed(0)
    model, rows, machine = dense(), [], None
    for batch, runs in RUNS.items():
        inputs = model.example_inputs(batch)
        inputs["t"] = torch.full((batch,), 500)  # one step of a sampler: all samples at one time
        half = skipping(model, inputs, heads=6, groups=8, tokens=0.73)
        third = skipping(model, inputs, heads=6, groups=6, tokens=0.5)
        total = profile(model, inputs, memory=False).total
        side = interleave(
            {"dense": partial(model, **inputs), "half": partial(half, **inputs),
             "third": partial(third, **inputs)},
            warmup=1, runs=runs, threads=THREADS,
        )  # fmt: skip
        machine = side.rows["dense"].machine
        what = {
            "dense": "dense DiT-B/2",
            "half": "6 of 12 heads, 8 of 12 groups, 73 % of the tokens",
            "third": "6 of 12 heads, 6 of 12 groups, half of the tokens",
        }
        for name, made in (("dense", model), ("half", half), ("third", third)):
            r = side.rows[name]
            done = profile(made, inputs, memory=False).executed or total
            ratio = median(
                a / b for a, b in zip(r.samples, side.rows["dense"].samples, strict=True)
            )
            rows.append(
                Row(
                    what=f"batch {batch}: {what[name]}, {done / total:.0%} of the MACs",
                    value=f"{1e3 * r.median:.0f} ms",
                    spread=f"{1e3 * r.p10:.0f} to {1e3 * r.p90:.0f}",
                    ratio=ratio,
                    target=AIM if name == "half" else None,
                )
            )
    assert machine is not None
    notes = [
        "one step of a sampler, float32, eager, random weights; the parts are cut to the active "
        "heads and groups once, before the timing, as `prepare_widths` does for a grid of times",
        "MACs include routers and token gates, against the whole dense model",
        "one thread by default: on a machine that others use, threads that wait for each other "
        "measure the others",
    ]
    write("dynamic_width", "DyDiT-B/2 against DiT-B/2 on the CPU", rows, machine, notes)


if __name__ == "__main__":
    main()
