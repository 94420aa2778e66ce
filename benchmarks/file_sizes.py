"""Sizes of saved models: int8 and 4-bit blockwise quantization against float32."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from effformer.compress import quantize
from markdown import Row, write

import effformer
from effformer.profile import machine

SCHEMES = {"int8": 0.27, "int4": None, "nf4": 0.15, "fp4": None}
DIGITS = {"input_size": 8, "channels": 1, "num_classes": 10, "learn_sigma": False}
MODELS = {
    "dit-b": ("dit-b", {}),
    "the demo's sit-tiny": ("sit-tiny", DIGITS),
    "sit-tiny": ("sit-tiny", {}),
}


def saved(model: torch.nn.Module, folder: Path) -> int:
    effformer.save_pretrained(model, folder)
    return (folder / "model.safetensors").stat().st_size


def main() -> None:
    rows = []
    for name, (preset, overrides) in MODELS.items():
        torch.manual_seed(0)
        model = effformer.build_model(preset, **overrides)
        with tempfile.TemporaryDirectory() as folder:
            full = saved(model, Path(folder) / "fp32")
            rows.append(Row(what=f"{name}, float32", value=f"{full / 2**20:.2f} MiB"))
            for scheme, target in SCHEMES.items():
                size = saved(quantize(model, scheme)[0], Path(folder) / scheme)
                value = f"{size / 2**20:.2f} MiB"
                rows.append(
                    Row(what=f"{name}, {scheme}", value=value, ratio=size / full, target=target)
                )
    notes = [
        "size of model.safetensors as `save_pretrained` writes it, all tensors and metadata",
        "in a model as small as sit-tiny the position table (float32, part of the published layout) "
        "and the label table of 1,000 classes weigh more than its blocks save",
    ]
    write("file_sizes", "Sizes of quantized models", rows, machine(), notes)


if __name__ == "__main__":
    main()
