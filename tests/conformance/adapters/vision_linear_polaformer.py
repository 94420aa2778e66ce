"""Polarity-aware linear attention of PolaFormer, with spatial reduction or without."""

from __future__ import annotations

from harness import Golden
from vision_linear import Options, Weights, check_cases, plain

from effformer.attention import PolaFormer


def check(golden: Golden) -> None:
    names = {
        "sr": "reduce.conv",
        "norm": "reduce.norm",
        "dwc": "lepe.conv",
        "positional_encoding": "positions.table",
    }
    check_cases(golden, PolaFormer, _config, plain(**names))


def _config(options: Options, weights: Weights) -> PolaFormer.Config:
    kernel = weights["dwc.weight"].shape[-1]
    assert options.get("kernel", kernel) == kernel
    return PolaFormer.Config(
        qkv_bias="qg.bias" in weights,
        proj_bias="proj.bias" in weights,
        alpha=options.get("alpha", 4),
        positions="positional_encoding" in weights,
        reduction=options.get("sr", 1),
        kernel=kernel,
        eps=options.get("eps", 1e-6),
    )
