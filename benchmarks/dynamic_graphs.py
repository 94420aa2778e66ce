"""DyDiT-B/2 and ViT-B/16 with adaptive FFNs that execute half of their multiply-adds, as ONNX graphs
that gather at run time, against the graphs of the dense models.

Usage: python benchmarks/dynamic_graphs.py [--small]
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dynamic_width import skipping
from effformer.export import Session, export_onnx
from markdown import Row, write
from torch import Tensor, nn

import effformer
from effformer.profile import interleave, profile

SMALL = "--small" in sys.argv
AIM = 0.65


@torch.no_grad()
def drawn(name: str, **options: Any) -> nn.Module:
    model = effformer.build_model(name, **options).eval()
    for p in model.parameters():
        p.normal_(std=0.02)  # nothing is zero, as in a trained model
    return model


def diffusion() -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    name, heads = ("dit-nano", 1) if SMALL else ("dit-b", 6)
    model = drawn(name)
    inputs = model.example_inputs(1)
    inputs["t"] = torch.full((1,), 500)
    groups, tokens = (1, 0.5) if SMALL else (8, 0.73)
    return (
        model,
        skipping(model, inputs, heads=heads, groups=groups, tokens=tokens, name=f"dy{name}"),
        inputs,
    )


@torch.no_grad()
def classifier() -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Gates that are set so that tokens run 1 of 4 learners, in the last two blocks none."""
    name = "vit-nano" if SMALL else "vit-b-16"
    model, made = drawn(name), drawn(name, ffn="acm")
    inputs = model.example_inputs(1)
    for i, block in enumerate(made.blocks):
        last = block.ffn.part.learners.gate.net[-1]
        last.weight.zero_()
        last.bias.zero_()
        last.bias[int(i < len(made.blocks) - 2)] = 1.0
    return model, made, inputs


def main() -> None:
    torch.manual_seed(0)
    rows, machine = [], None
    with tempfile.TemporaryDirectory() as folder:
        for title, make in (("DiT-B/2", diffusion), ("ViT-B/16", classifier)):
            model, made, inputs = make()
            total = profile(model, inputs, memory=False).total
            done = profile(made, inputs, memory=False).executed or total
            calls = {}
            for kind, one in (("dense", model), ("dynamic", made)):
                path = Path(folder) / f"{kind}.onnx"
                export_onnx(one, path, inputs, verify=False, force=True)
                calls[kind] = partial(Session(path, threads=1).run, inputs)
            side = interleave(calls, warmup=1, runs=3 if SMALL else 11, threads=1)
            machine = side.rows["dense"].machine
            for kind in calls:
                r = side.rows[kind]
                share = f", {done / total:.0%} of its MACs" if kind == "dynamic" else ""
                rows.append(
                    Row(
                        what=f"{title} {kind}{share}", value=f"{1e3 * r.median:.0f} ms",
                        spread=f"{1e3 * r.p10:.0f} to {1e3 * r.p90:.0f}",
                        ratio=side.ratios[kind] if kind == "dynamic" else None,
                        target=AIM if kind == "dynamic" else None,
                    )
                )  # fmt: skip
    assert machine is not None
    notes = [
        "one image, ONNX Runtime on one thread, float32, random weights; gates are set, and what they "
        "choose is found while the graph runs",
        "DiT: 6 of 12 heads, 8 of 12 groups of channels, 73 % of the tokens; ViT: 1 of 4 learners for "
        "every token, none in the last two blocks",
        "MACs include routers and gates, against the whole dense model",
    ]
    write("dynamic_graphs", "Dynamic models as ONNX graphs", rows, machine, notes, keep=not SMALL)


if __name__ == "__main__":
    main()
