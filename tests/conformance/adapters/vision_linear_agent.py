"""Agent attention: pyramid forms with spatial reduction or without, and the form with a class
token.
"""

from __future__ import annotations

import torch
from harness import Golden
from vision_linear import Options, Weights, check_cases, plain

from effformer.attention import Agent

_rename = plain(sr="reduce.conv", norm="reduce.norm", dwc="lepe.conv")
BIASES = {
    "an_bias": "keys", "ah_bias": "key_rows", "aw_bias": "key_columns", "ac_bias": "key_front",
    "na_bias": "queries", "ha_bias": "query_rows", "wa_bias": "query_columns",
    "ca_bias": "query_front",
}  # fmt: skip
AGENTS_LAST = ("ha_bias", "wa_bias", "ca_bias")


def check(golden: Golden) -> None:
    check_cases(golden, Agent, _config, _translate)


def _config(options: Options, weights: Weights) -> Agent.Config:
    fused = "qkv.weight" in weights
    return Agent.Config(
        agents=options["agents"],
        bias="full" if "an_bias" in weights else "none",
        qkv_bias=("qkv.bias" if fused else "q.bias") in weights,
        proj_bias="proj.bias" in weights,
        reduction=options.get("sr", 1),
        kernel=weights["dwc.weight"].shape[-1],
    )


def _translate(official: Weights, options: Options) -> Weights:
    ours, heads, agents = {}, options["heads"], options["agents"]
    for key, value in official.items():
        first, _, kind = key.partition(".")
        if first in BIASES:
            if first in AGENTS_LAST:
                value = value.transpose(-1, -2) if first == "ca_bias" else value.movedim(-1, 2)
            ours[f"bias.{BIASES[first]}"] = value.reshape(heads, agents, -1)
        elif first == "qkv":
            q, k, v = value.chunk(3)
            ours |= {f"q.{kind}": q, f"kv.{kind}": torch.cat([k, v])}
        else:
            ours |= _rename({key: value}, options)
    return ours
