"""Whole layers of Gated DeltaNet and of Kimi Delta Attention."""

from __future__ import annotations

from typing import Any

from gated_layers import check_layer, joined
from harness import Golden
from torch import Tensor

from effformer.attention import KDA, Attention, GatedDelta
from effformer.attention.outputs import OutputGate
from effformer.site import Site

CORES = {"gated-linear_layer_gdn": GatedDelta, "gated-linear_layer_kda": KDA}
ACTS = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}
PLAIN = {
    "A_log": "core.rate", "b_proj": "inputs.beta", "a_proj": "inputs.decay",
    "f_proj": "inputs.decay", "g_proj": "output.proj", "o_norm": "output", "o_proj": "proj",
}  # fmt: skip
"""First word of an official key -> ours."""


def check(golden: Golden) -> None:
    config = golden.config
    if golden.name not in CORES:
        raise NotImplementedError(f"{golden.name}: only {', '.join(CORES)}")
    golden.only("qk_scale", "head_dim**-0.5 on q after L2", why="the published scale")
    golden.only("gate", *ACTS, why="gates of the layers")
    width, heads = config["head_dim"], config["value_heads"]
    keys = 2 * config["heads"] * width
    channels = keys + heads * int(width * config["expand_v"])
    check_layer(
        golden, _config(golden), Site(dim=config["hidden"], heads=heads),
        lambda official: _translate(official, heads), list(range(channels)),
    )  # fmt: skip


def _config(golden: Golden) -> Attention.Config:
    config, core = golden.config, CORES[golden.name]
    gate: dict[str, Any] = {"per": "none"}
    if config["use_gate"] and core is GatedDelta:
        gate = {"act": ACTS[config["gate"]]}
    elif config["use_gate"]:
        gate = {"act": "sigmoid", "rank": "head", "bias": True}  # its gate has no other form
    shared = config["heads"] != config["value_heads"]
    return Attention.Config(
        core=core.Config(causal=True, negative=config["allow_neg_eigval"], eps=config["l2_eps"]),
        gate=OutputGate(norm="head", eps=config["norm_eps"], **gate),
        head_dim=config["head_dim"],
        value_dim=int(config["head_dim"] * config["expand_v"]),
        qk_heads=config["heads"] if shared else None,
        short_conv=config["conv_size"],
        short_conv_bias=config["conv_bias"],
        qkv_bias=False,
        proj_bias=False,
    )


def _translate(official: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    ours = {"qkv.weight": joined(official, *(f"{n}_proj.weight" for n in "qkv"))}
    for kind in ("weight", "bias"):
        if f"q_conv1d.{kind}" in official:
            ours[f"conv.{kind}"] = joined(official, *(f"{n}_conv1d.{kind}" for n in "qkv"))
    for key, value in official.items():
        first, _, rest = key.partition(".")
        if first == "dt_bias":
            ours["core.bias"] = value if len(value) == heads else value.view(heads, -1)
        elif first in PLAIN:
            ours[".".join(filter(None, (PLAIN[first], rest)))] = value
    return ours
