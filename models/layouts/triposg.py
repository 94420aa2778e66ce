"""Key layouts of TripoSG: the transformer and its mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

from .forms import SIZES, Form

__all__ = ["MOE", "OFFICIAL", "apart", "together", "turned"]

_KINDS = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}


def _to_ours(state: StateDict, config: Any) -> StateDict:
    out: StateDict = {}
    for key, value in state.items():
        if key in _KINDS:
            out |= {f"experts.{e}.{_KINDS[key]}": x for e, x in enumerate(value)}
        elif key.removeprefix("shared_") in _KINDS:
            out[f"shared.{_KINDS[key.removeprefix('shared_')]}"] = value
        else:
            out["router.weight" if key == "gate" else key] = value
    return out


def _from_ours(state: StateDict, config: Any) -> StateDict:
    out: StateDict = {}
    for theirs, ours in _KINDS.items():
        keys = [f"experts.{e}.{ours}" for e in range(config.experts)]
        if all(key in state for key in keys):
            out[theirs] = torch.stack([state[key] for key in keys])
        if f"shared.{ours}" in state:
            out[f"shared_{theirs}"] = state[f"shared.{ours}"]
    if "router.weight" in state:
        out["gate"] = state["router.weight"]
    return out


MOE = Layout(
    name="stacked", recognise=has_keys("gate", "w1", "w2"), to_ours=_to_ours, from_ours=_from_ours
)
"""One `effformer.ffn.MoE`; no official code is published, and this is how its experts are stored
together: ``gate`` (E, D), ``w1`` (E, h, D), ``w2`` (E, D, h), ``shared_w1``, ...
"""


def apart(value: Tensor, parts: int, heads: int) -> Tensor:
    """Rows of a fused projection as we have them: all heads of each part.

    The published network stacks its projections and takes every head's rows for all parts from the
    whole: what is called ``to_q`` holds rows of keys and values, too.

    Args:
        value: (parts heads K, ...).
        parts: 3 for queries, keys and values, 2 for keys and values.
        heads: number of heads.
    """
    if value.shape[0] % (parts * heads):  # reported as a wrong shape
        return value
    return value.unflatten(0, (heads, parts, -1)).transpose(0, 1).flatten(0, 2)


def together(value: Tensor, parts: int, heads: int) -> Tensor:
    """The way back from `apart`."""
    return value.unflatten(0, (parts, heads, -1)).transpose(0, 1).flatten(0, 2)


_ATTENTIONS = {
    "attn": ("attn1", "norm1"),
    "cross": ("attn2", "norm2"),
    "cross_2": ("attn2_2", "norm2_2"),
}
_OFFICIAL = renamed(
    "official",
    [
        ("embed", "proj_in"),
        ("time_embed.fc1", "time_proj.linear_1"),
        ("time_embed.fc2", "time_proj.linear_2"),
        *(
            pair
            for ours, (attn, norm) in _ATTENTIONS.items()
            for pair in (
                (f"blocks.{{i}}.{ours}.norm", f"blocks.{{i}}.{norm}"),
                (f"blocks.{{i}}.{ours}.part.proj", f"blocks.{{i}}.{attn}.to_out.0"),
                (f"blocks.{{i}}.{ours}.part.q_norm", f"blocks.{{i}}.{attn}.norm_q"),
                (f"blocks.{{i}}.{ours}.part.k_norm", f"blocks.{{i}}.{attn}.norm_k"),
                *(((f"blocks.{{i}}.{ours}.part.q", f"blocks.{{i}}.{attn}.to_q"),) if ours != "attn" else ()),
            )
        ),
        ("blocks.{i}.ffn.norm", "blocks.{i}.norm3"),
        ("blocks.{i}.ffn.part.fc1", "blocks.{i}.ff.net.0.proj"),
        ("blocks.{i}.ffn.part.fc2", "blocks.{i}.ff.net.2"),
        ("skips.{i}.linear", "blocks.{i}.skip_linear"),
        ("skips.{i}.norm", "blocks.{i}.skip_norm"),
        ("norm", "norm_out"),
        ("head", "proj_out"),
    ],
    recognise=has_keys("time_proj.linear_1.weight", "blocks.0.attn2.norm_q.weight"),
    rows=[
        Rows(
            ("blocks.{i}.attn.part.qkv.{kind}",),
            tuple(f"blocks.{{i}}.attn1.to_{x}.{{kind}}" for x in "qkv"),
        ),
        *(
            Rows(
                (f"blocks.{{i}}.{ours}.part.kv.{{kind}}",),
                tuple(f"blocks.{{i}}.{_ATTENTIONS[ours][0]}.to_{x}.{{kind}}" for x in "kv"),
            )
            for ours in ("cross", "cross_2")
        ),
    ],
)  # fmt: skip


def turned(state: StateDict, config: Any, turn: Callable[[Tensor, int, int], Tensor]) -> StateDict:
    """A state dict of ours with its fused projections by `apart` or `together`."""
    out: StateDict = {}
    for key, value in state.items():
        parts = 3 if ".part.qkv." in key else 2 if ".part.kv." in key else 0
        out[key] = turn(value, parts, config.heads) if parts else value
    return out


def _to_official(state: StateDict, config: Any) -> StateDict:
    return _OFFICIAL.from_ours(turned(state, config, together), config)


def _options(config: Any) -> Mapping[str, Any]:
    """Options of the published ``TripoSGDiTModel``."""
    return {
        "num_attention_heads": config.heads,
        "width": config.dim,
        "in_channels": config.channels,
        "num_layers": config.depth,
        "cross_attention_dim": config.image_dim,
        "cross_attention_2_dim": config.second_dim,
    }


OFFICIAL = Layout(
    name="official",
    recognise=_OFFICIAL.recognise,
    to_ours=lambda state, config: turned(_OFFICIAL.to_ours(state, config), config, apart),
    from_ours=_to_official,
    strange=Form(
        free=(
            *SIZES, "channels", "latents", "image_dim", "image_length", "second_dim", "second_length",
        ),
    ).strange,
    options=_options,
)  # fmt: skip
"""The transformer."""
