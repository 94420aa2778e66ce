"""Focused linear attention of the FLatten Transformer, with spatial reduction or without."""

from __future__ import annotations

from harness import Golden
from vision_linear import Options, Weights, check_cases, plain

from effformer.attention import Focused


def check(golden: Golden) -> None:
    names = {
        "sr": "reduce.conv",
        "norm": "reduce.norm",
        "dwc": "lepe.conv",
        "positional_encoding": "positions.table",
    }
    check_cases(golden, Focused, _config, plain(**names))


def _config(options: Options, weights: Weights) -> Focused.Config:
    kernel = weights["dwc.weight"].shape[-1]
    assert options.get("kernel", kernel) == kernel
    return Focused.Config(
        qkv_bias="q.bias" in weights,
        proj_bias="proj.bias" in weights,
        power=options.get("p", 3),
        positions="positional_encoding" in weights,
        reduction=options.get("sr", 1),
        kernel=kernel,
        eps=options.get("eps", 1e-6),
    )
