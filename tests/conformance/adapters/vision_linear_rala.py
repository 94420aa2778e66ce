"""Rank-augmented linear attention."""

from __future__ import annotations

from harness import Golden
from vision_linear import Options, Weights, check_cases, plain

from effformer.attention import RALA


def check(golden: Golden) -> None:
    check_cases(golden, RALA, _config, plain(qkvo="qkvg", lepe="lepe.conv"))


def _config(options: Options, weights: Weights) -> RALA.Config:
    return RALA.Config(
        qkv_bias="qkvo.bias" in weights,
        proj_bias="proj.bias" in weights,
        kernel=weights["lepe.weight"].shape[-1],
        eps=options.get("eps", 1e-6),
    )
