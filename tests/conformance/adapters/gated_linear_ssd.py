"""The mixer of Mamba-2."""

from __future__ import annotations

import torch
from gated_layers import check_layer
from harness import Golden
from torch import Tensor

from effformer.attention import SSD, Attention
from effformer.attention.outputs import OutputGate
from effformer.site import Site


def check(golden: Golden) -> None:
    config = golden.config
    dim, keys, groups = config["hidden_size"], config["state_size"], config["n_groups"]
    values, width = config["expand"] * dim, config["head_dim"]
    heads = values // width
    ours = Attention.Config(
        core=SSD.Config(causal=True, chunk=config["chunk_size"]),
        gate=OutputGate(
            act="silu", norm="groups", groups=groups, eps=config["layer_norm_epsilon"], first=True
        ),
        head_dim=keys,
        value_dim=width,
        qk_heads=groups,
        short_conv=config["conv_kernel"],
        short_conv_bias=True,
        qkv_bias=False,
        proj_bias=False,
    )
    sizes = {"x": values, "B": groups * keys, "C": groups * keys}
    order = torch.arange(sum(sizes.values())).split([sizes[n] for n in "CBx"])
    named = dict(zip("CBx", order, strict=True))
    conv = torch.cat([named[n] for n in sizes]).tolist()
    check_layer(
        golden, ours, Site(dim=dim, heads=heads),
        lambda official: _translate(official, list(sizes.values()), heads), conv,
    )  # fmt: skip


def _translate(official: dict[str, Tensor], sizes: list[int], heads: int) -> dict[str, Tensor]:
    """Rows z, x, B, C, dt of one matrix are our gate, v, k, q and time."""
    z, x, b, c, dt = official["in_proj.weight"].split([sizes[0], *sizes, heads])
    ours = {
        "output.proj.weight": z, "qkv.weight": torch.cat([c, b, x]), "inputs.time.weight": dt,
        "core.rate": official["A_log"], "core.bias": official["dt_bias"],
        "core.skip": official["D"], "output.weight": official["norm.weight"],
        "proj.weight": official["out_proj.weight"],
    }  # fmt: skip
    for kind in ("weight", "bias"):
        x, b, c = official[f"conv1d.{kind}"].split(sizes)
        ours[f"conv.{kind}"] = torch.cat([c, b, x])
    return ours
