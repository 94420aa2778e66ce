"""Compressing a model of 300 million parameters: how much memory that takes, and how long the sensitivity
of every layer of BERT-base takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from effformer.compress import adapt, prune, quantize, sensitivity, sparsify
from markdown import Row, write
from torch import Tensor

import effformer
from effformer.profile import machine, peak_rss

LARGE = {"dim": 1024, "depth": 24, "heads": 16, "image_size": 64}
TEXTS, TOKENS = 8, 64


def model() -> Any:
    """ViT-L at random, on pictures of 64 x 64."""
    torch.manual_seed(0)
    return effformer.build_model("vit-b-16", **LARGE).eval()


def pictures(count: int = 4) -> dict[str, Tensor]:
    return {"x": torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))}


VERBS: dict[str, Callable[[Any], Any]] = {
    "the model alone": lambda model: model,
    "quantize to int8": lambda model: quantize(model, "int8"),
    "quantize to nf4": lambda model: quantize(model, "nf4"),
    "quantize by gptq, on data": lambda model: quantize(model, "gptq", data=pictures()),
    "quantize by awq, on data": lambda model: quantize(model, "awq", data=pictures()),
    "prune to half of the MACs": lambda model: prune(model, {"macs": 0.5}),
    "prune by activation, on data": lambda model: prune(
        model, {"macs": 0.5, "importance": "activation"}, data=pictures()
    ),
    "sparsify, 2 of 4": lambda model: sparsify(model, {"kind": "n:m"}),
    "adapt, rank 8": lambda model: adapt(model, {"rank": 8}),
}


def run_once(verb: str) -> None:
    """Called in a fresh process, which measures its memory."""
    torch.set_num_threads(2)
    VERBS[verb](model())


def bert() -> tuple[float, int]:
    """Seconds for the sensitivity of every layer of BERT-base in two formats, and the number of rows."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    base: Any = effformer.build_model("bert-base").eval()
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 30522, (TEXTS, TOKENS), generator=generator)
    data = {"tokens": texts}
    start = time.perf_counter()
    found = sensitivity(base, ["int8", "int4"], data=data)
    return time.perf_counter() - start, len(found.rows)


def main() -> None:
    size = sum(p.numel() * p.element_size() for p in model().parameters())
    rows = []
    for verb in VERBS:
        used = peak_rss(run_once, verb)
        aim = None if verb == "the model alone" else 2.5
        rows.append(Row(what=verb, value=f"{used / 2**30:.2f} GiB", ratio=used / size, target=aim))
        print(verb, f"{used / size:.2f}", flush=True)
    seconds, count = bert()
    rows.append(
        Row(
            what=f"sensitivity of BERT-base, {count} layers and formats (minutes)",
            value=f"{seconds:.0f} s", ratio=seconds / 60, target=10,
        )
    )  # fmt: skip
    notes = [
        f"ViT-L, {size / 4e6:.0f} million parameters at random in float32 ({size / 2**30:.2f} GiB), each verb in a "
        "fresh process: growth of its resident memory, the model included, over the bytes of the model",
        f"sensitivity on {TEXTS} texts of {TOKENS} tokens in int8 and int4, two threads",
    ]
    write("compress_large", "Compressing large models", rows, machine(), notes)


if __name__ == "__main__":
    main()
