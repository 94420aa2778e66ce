"""DiT-B/2, batch 1, float32: ours against diffusers, inference-ready, and exported to ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import torch
from diffusers import DiTTransformer2DModel
from effformer.export import Session, export_onnx
from markdown import Row, write

import effformer
from effformer.profile import interleave

THREADS, RUNS = 2, 51


def peer() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=12, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    model = effformer.build_model("dit-b").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)  # nothing is zero, as in a trained model
    ready = effformer.optimize(model)
    inputs = model.example_inputs()
    x, t, y = inputs["x"], inputs["t"], inputs["y"]
    other = peer()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dit-b.onnx"
        export_onnx(model, path, verify=True)
        session = Session(path, threads=THREADS)
        feed = {name: value.numpy() for name, value in inputs.items()}
        side = interleave(
            {
                "diffusers DiTTransformer2DModel, eager": lambda: other(x, t, y, return_dict=False),
                "effformer, eager": lambda: model(x, t, y),
                "effformer.optimize, eager": lambda: ready(x, t, y),
                "effformer in ONNX Runtime": lambda: session.run(feed),
            },
            warmup=3, runs=RUNS, threads=THREADS, pause=0.1,
        )  # fmt: skip
    aims = {"effformer, eager": 1.0, "effformer.optimize, eager": 0.87}
    rows = []
    for name, r in side.rows.items():
        value, spread = f"{1e3 * r.median:.0f} ms", f"{1e3 * r.p10:.0f} to {1e3 * r.p90:.0f}"
        rows.append(
            Row(
                what=name,
                value=value,
                spread=spread,
                ratio=side.ratios[name],
                target=aims.get(name),
            )
        )
    eager = side.rows["effformer, eager"].samples
    runtime = side.rows["effformer in ONNX Runtime"].samples
    against = median(a / b for a, b in zip(runtime, eager, strict=True))
    rows.append(Row(what="ONNX Runtime against our eager", value="", ratio=against, target=0.8))
    notes = [
        "batch 1, 256 tokens, random weights; ratios against diffusers unless the row says otherwise",
        "0.1 s of rest before every call: threads of one runtime that still spin slow the next",
    ]
    write("dit_latency", "DiT-B/2 on the CPU", rows, side.rows["effformer, eager"].machine, notes)


if __name__ == "__main__":
    main()
