"""Key layouts of DiT and SiT: the official one and diffusers' ``DiTTransformer2DModel``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from effformer.checks import FormatError
from effformer.layout import Layout, StateDict, has_keys, renamed
from effformer.nn.embeddings import sincos_2d

from .forms import SIZES, Choice, Form, same_table

__all__ = [
    "DIFFUSERS",
    "FLOW",
    "LATENT",
    "NAMES",
    "OFFICIAL",
    "SIT_OFFICIAL",
    "SQUARE",
    "check_positions",
]

LATENT = (
    *SIZES, "channels", "patch", "num_classes", "label_dropout", "learn_sigma", "positions",
    "ffn.ratio", "ffn.hidden",
)  # fmt: skip
"""Options of ours that the official DiT and its descendants have."""

SQUARE: dict[str, Choice] = {"input_size": lambda size: isinstance(size, int) or size[0] == size[1]}
"""They take square inputs."""

FLOW = {"path_type": "Linear", "prediction": "velocity"}
"""Options of the official training of SiT and its descendants whose convention is ours."""

_GATES = ("groups", "bias", "tau", "reduction")
_OFFICIAL_FORM = Form(
    free=(*LATENT, *(f"{slot}.{name}" for slot in ("width", "tokens") for name in _GATES)),
    choices={**SQUARE, "width": (None, "dynamic"), "tokens": (None, "dynamic")},
)
_DIFFUSERS_FORM = Form(
    free=(*SIZES, "channels", "patch", "num_classes", "learn_sigma", "ffn_norm_eps"),
    choices={
        **SQUARE,
        "label_dropout": lambda rate: rate > 0,  # there is a null class
        "time_freq_shift": lambda shift: shift == 1,
        "ffn": ("mlp", "geglu", "swiglu"),
        "ffn.ratio": lambda ratio: ratio == 4,
        "ffn.act": ("gelu-tanh", "gelu", "silu"),
        "width": lambda part: part is None,
        "tokens": lambda part: part is None,
    },
)
_ACTIVATIONS = {
    ("mlp", "gelu-tanh"): "gelu-approximate",
    ("mlp", "gelu"): "gelu",
    ("mlp", "silu"): "linear-silu",
    ("geglu", "gelu"): "geglu",
    ("swiglu", "silu"): "swiglu",
}
"""Network and activation of ours -> ``activation_fn`` there."""

NAMES = (
    ("patch_embed.proj", "x_embedder.proj"),
    ("pos_embed", "pos_embed"),
    ("time_embed.fc1", "t_embedder.mlp.0"),
    ("time_embed.fc2", "t_embedder.mlp.2"),
    ("label_embed.table", "y_embedder.embedding_table"),
    ("blocks.{i}.attn.part", "blocks.{i}.attn"),
    ("blocks.{i}.ffn.part", "blocks.{i}.mlp"),
    ("blocks.{i}.width.gates.attn.router", "blocks.{i}.attn_rate.router"),
    ("blocks.{i}.width.gates.ffn.router", "blocks.{i}.mlp_rate.router"),
    ("blocks.{i}.tokens.gates.ffn.fc1", "blocks.{i}.token_selection.mlp_head.0"),
    ("blocks.{i}.tokens.gates.ffn.fc2", "blocks.{i}.token_selection.mlp_head.2"),
    ("blocks.{i}.modulation.linear", "blocks.{i}.adaLN_modulation.1"),
    ("final.modulation.linear", "final_layer.adaLN_modulation.1"),
    ("final.linear", "final_layer.linear"),
)
"""(our prefix, official prefix); gates are those of DyDiT."""

_NAMES = renamed(
    "official", NAMES, recognise=has_keys("x_embedder.proj.weight", "t_embedder.mlp.0.weight")
)


_HALF = (torch.float16, torch.bfloat16)


def check_positions(state: StateDict, config: Any) -> StateDict:
    """Refuse a position table that is not the fixed one, unless the model has a learned table; that of
    a file in half precision is as exact again as the positions of other sizes.
    """
    table = state.get("pos_embed")
    if table is None or config.positions == "learned":
        return state
    rows, columns = config.grid
    expected = sincos_2d(rows, columns, config.dim)
    if table.shape != expected.shape:
        return state
    if not same_table(table, expected):
        raise FormatError(
            "pos_embed is not the fixed sin-cos table; build the model with positions='learned'"
        )
    return {**state, "pos_embed": expected} if table.dtype in _HALF else state


OFFICIAL = Layout(
    name="official",
    recognise=_NAMES.recognise,
    to_ours=lambda state, config: check_positions(_NAMES.to_ours(state, config), config),
    from_ours=_NAMES.from_ours,
    strange=_OFFICIAL_FORM.strange,
)
SIT_OFFICIAL = replace(OFFICIAL, options=lambda config: FLOW)

_EMBED = "transformer_blocks.{}.norm1.emb."
_SHARED = {
    "time_embed.fc1": "timestep_embedder.linear_1",
    "time_embed.fc2": "timestep_embedder.linear_2",
    "label_embed.table": "class_embedder.embedding_table",
}
_RENAMES = renamed(
    "diffusers",
    [
        ("patch_embed.proj", "pos_embed.proj"),
        ("blocks.{i}.attn.part.proj", "transformer_blocks.{i}.attn1.to_out.0"),
        ("blocks.{i}.ffn.part.fc1", "transformer_blocks.{i}.ff.net.0.proj"),
        ("blocks.{i}.ffn.part.fc2", "transformer_blocks.{i}.ff.net.2"),
        ("blocks.{i}.modulation.linear", "transformer_blocks.{i}.norm1.linear"),
        ("final.modulation.linear", "proj_out_1"),
        ("final.linear", "proj_out_2"),
    ],
    recognise=has_keys("pos_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight"),
)


def _from_diffusers(state: StateDict, config: Any) -> StateDict:
    """Merge q, k, v; take the embedders from block 0 (every block holds a copy); add the fixed
    positions.
    """
    state = dict(state)
    out: StateDict = {}
    for i in range(config.depth):
        for kind in ("weight", "bias"):
            keys = [f"transformer_blocks.{i}.attn1.to_{x}.{kind}" for x in "qkv"]
            if all(k in state for k in keys):
                out[f"blocks.{i}.attn.part.qkv.{kind}"] = torch.cat([state.pop(k) for k in keys])
        for ours, theirs in _SHARED.items():
            for kind in ("weight", "bias"):
                key = f"{_EMBED.format(i)}{theirs}.{kind}"
                if key in state:
                    value = state.pop(key)
                    first = out.setdefault(f"{ours}.{kind}", value)
                    if not torch.equal(first, value):
                        raise FormatError(
                            f"{key} differs from block 0's copy; this model has one embedder"
                        )
    rows, columns = config.grid
    out.setdefault("pos_embed", sincos_2d(rows, columns, config.dim))
    return out | _RENAMES.to_ours(_turned(state, config), config)


def _turned(state: StateDict, config: Any) -> StateDict:
    """Gated networks hold the rows of the value first, ours those of the gate."""
    if config.ffn is None or config.ffn.entry.name not in ("geglu", "swiglu"):
        return state
    gated = re.compile(r"transformer_blocks\.\d+\.ff\.net\.0\.proj\.(weight|bias)")
    return {
        key: torch.cat(value.chunk(2)[::-1]) if gated.fullmatch(key) else value
        for key, value in state.items()
    }


def _to_diffusers(state: StateDict, config: Any) -> StateDict:
    out: StateDict = {}
    for key, value in state.items():
        if key == "pos_embed":
            continue
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.part\.qkv\.(weight|bias)", key):
            for name, third in zip("qkv", value.chunk(3), strict=True):
                out[f"transformer_blocks.{match[1]}.attn1.to_{name}.{match[2]}"] = third
        elif (stem := key.rpartition(".")[0]) in _SHARED:
            for i in range(config.depth):
                out[f"{_EMBED.format(i)}{_SHARED[stem]}.{key.rpartition('.')[2]}"] = value
        else:
            out |= _RENAMES.from_ours({key: value}, config)
    return _turned(out, config)


def _strange(config: Any) -> dict[str, str]:
    found = _DIFFUSERS_FORM.strange(config)
    if "time_freq_shift" in found:
        found["time_freq_shift"] = "time_freq_shift=0 (1 there)"
    if not {"ffn", "ffn.act"} & found.keys() and _activation(config) is None:
        found["ffn.act"] = f"ffn.act={config.ffn.act!r} in {config.ffn.entry.name!r}"
    return found


def _activation(config: Any) -> str | None:
    return _ACTIVATIONS.get((config.ffn.entry.name, config.ffn.act))


def _options(config: Any) -> Mapping[str, Any]:
    return {
        "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
        "num_attention_heads": config.heads,
        "attention_head_dim": config.dim // config.heads,
        "sample_size": config.size[0],
        "patch_size": config.patch,
        "activation_fn": _activation(config),
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": config.ffn_norm_eps,
        "attention_bias": True,
        "upcast_attention": False,
    }


DIFFUSERS = Layout(
    name="diffusers",
    recognise=_RENAMES.recognise,
    to_ours=_from_diffusers,
    from_ours=_to_diffusers,
    strange=_strange,
    options=_options,
)
