"""Key layouts of FLUX: the official one and diffusers' ``FluxTransformer2DModel``.

Both number the blocks of two streams and the others apart, and keep what stands behind the two
branches of the others in one matrix, whose columns are those of the attention, then those of the FFN.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from effformer.layout import Layout, Rows, StateDict, has_keys, renamed
from effformer.nn.rope import GridRope

from .forms import SIZES, Form

__all__ = ["DIFFUSERS", "OFFICIAL"]

_SINGLE = "blocks.{i}.attn.part.proj.weight", "blocks.{i}.ffn.part.fc2.weight"
_FORM = Form(
    free=(
        *SIZES, "doubles", "input_size", "channels", "condition_channels", "patch", "text_dim", "text_length",
        "guidance", "rope.widths", "ffn.ratio", "ffn.hidden",
    ),
    choices={"pooled_dim": lambda width: width is not None},
)  # fmt: skip

_OFFICIAL_NAMES = (
    ("patch_embed.proj", "img_in"),
    ("text_embed", "txt_in"),
    ("time_embed.fc1", "time_in.in_layer"),
    ("time_embed.fc2", "time_in.out_layer"),
    ("pooled_embed.0", "vector_in.in_layer"),
    ("pooled_embed.2", "vector_in.out_layer"),
    ("guidance_embed.fc1", "guidance_in.in_layer"),
    ("guidance_embed.fc2", "guidance_in.out_layer"),
    *(
        (f"blocks.{{i}}.{ours}.{inside}", f"double_blocks.{{i}}.{theirs}_{outside}")
        for ours, theirs in (("x", "img"), ("y", "txt"))
        for inside, outside in (
            ("attn.part.qkv", "attn.qkv"),
            ("attn.part.q_norm.weight", "attn.norm.query_norm.scale"),
            ("attn.part.k_norm.weight", "attn.norm.key_norm.scale"),
            ("attn.part.proj", "attn.proj"),
            ("ffn.part.fc1", "mlp.0"),
            ("ffn.part.fc2", "mlp.2"),
            ("modulation.linear", "mod.lin"),
        )
    ),
    ("blocks.{i}.attn.part.q_norm.weight", "single_blocks.{i}.norm.query_norm.scale"),
    ("blocks.{i}.attn.part.k_norm.weight", "single_blocks.{i}.norm.key_norm.scale"),
    ("blocks.{i}.modulation.linear", "single_blocks.{i}.modulation.lin"),
    ("blocks.{i}.ffn.part.fc2", "single_blocks.{i}.linear2"),
    ("final.modulation.linear", "final_layer.adaLN_modulation.1"),
    ("final.linear", "final_layer.linear"),
)
_DIFFUSERS_NAMES = (
    ("patch_embed.proj", "x_embedder"),
    ("text_embed", "context_embedder"),
    *(
        (f"{ours}.{layer}", f"time_text_embed.{theirs}_embedder.linear_{i + 1}")
        for ours, theirs, layers in (
            ("time_embed", "timestep", ("fc1", "fc2")),
            ("pooled_embed", "text", ("0", "2")),
            ("guidance_embed", "guidance", ("fc1", "fc2")),
        )
        for i, layer in enumerate(layers)
    ),
    ("blocks.{i}.x.attn.part.q_norm", "transformer_blocks.{i}.attn.norm_q"),
    ("blocks.{i}.x.attn.part.k_norm", "transformer_blocks.{i}.attn.norm_k"),
    ("blocks.{i}.y.attn.part.q_norm", "transformer_blocks.{i}.attn.norm_added_q"),
    ("blocks.{i}.y.attn.part.k_norm", "transformer_blocks.{i}.attn.norm_added_k"),
    ("blocks.{i}.x.attn.part.proj", "transformer_blocks.{i}.attn.to_out.0"),
    ("blocks.{i}.y.attn.part.proj", "transformer_blocks.{i}.attn.to_add_out"),
    ("blocks.{i}.x.ffn.part.fc1", "transformer_blocks.{i}.ff.net.0.proj"),
    ("blocks.{i}.x.ffn.part.fc2", "transformer_blocks.{i}.ff.net.2"),
    ("blocks.{i}.y.ffn.part.fc1", "transformer_blocks.{i}.ff_context.net.0.proj"),
    ("blocks.{i}.y.ffn.part.fc2", "transformer_blocks.{i}.ff_context.net.2"),
    ("blocks.{i}.x.modulation.linear", "transformer_blocks.{i}.norm1.linear"),
    ("blocks.{i}.y.modulation.linear", "transformer_blocks.{i}.norm1_context.linear"),
    ("blocks.{i}.attn.part.q_norm", "single_transformer_blocks.{i}.attn.norm_q"),
    ("blocks.{i}.attn.part.k_norm", "single_transformer_blocks.{i}.attn.norm_k"),
    ("blocks.{i}.ffn.part.fc1", "single_transformer_blocks.{i}.proj_mlp"),
    ("blocks.{i}.modulation.linear", "single_transformer_blocks.{i}.norm.linear"),
    ("blocks.{i}.ffn.part.fc2", "single_transformer_blocks.{i}.proj_out"),
    ("final.modulation.linear", "norm_out.linear"),
    ("final.linear", "proj_out"),
)
_DIFFUSERS_ROWS = tuple(
    Rows(
        ours=(f"blocks.{{i}}.{ours}attn.part.qkv.{{kind}}",),
        theirs=tuple(f"{block}.{{i}}.attn.{name}.{{kind}}" for name in theirs),
    )
    for ours, block, theirs in (
        ("x.", "transformer_blocks", ("to_q", "to_k", "to_v")),
        ("y.", "transformer_blocks", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ("", "single_transformer_blocks", ("to_q", "to_k", "to_v")),
    )
)
_OFFICIAL = has_keys("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight")
_DIFFUSERS = has_keys(
    "x_embedder.weight", "context_embedder.weight",
    "time_text_embed.timestep_embedder.linear_1.weight",
)  # fmt: skip


def _official(config: Any) -> Layout:
    """The names; the rows of ``linear1`` are q, k, v and those of the FFN."""
    hidden = 0 if config.ffn is None else config.ffn.width(config.dim)
    pieces = tuple(f"blocks.{{i}}.{part}.{{kind}}" for part in ("attn.part.qkv", "ffn.part.fc1"))
    shares = (3 * config.dim, hidden)
    fused = Rows(ours=pieces, theirs=("single_blocks.{i}.linear1.{kind}",), shares=shares)
    return renamed("official", _OFFICIAL_NAMES, recognise=_OFFICIAL, rows=[fused])


def _diffusers(config: Any) -> Layout:
    return renamed("diffusers", _DIFFUSERS_NAMES, recognise=_DIFFUSERS, rows=_DIFFUSERS_ROWS)


def _numbered(state: StateDict, blocks: str, offset: int) -> StateDict:
    """With another number of the first block called ``blocks``."""
    pattern = re.compile(rf"({re.escape(blocks)}\.)(\d+)(?=\.)")
    return {
        pattern.sub(lambda m: f"{m[1]}{int(m[2]) + offset}", key)
        if pattern.match(key)
        else key: value
        for key, value in state.items()
    }


def _reader(names: Callable[[Any], Layout], blocks: str) -> Callable[[StateDict, Any], StateDict]:
    def to_ours(state: StateDict, config: Any) -> StateDict:
        state = names(config).to_ours(_numbered(state, blocks, config.doubles), config)
        for i in range(config.doubles, config.depth):
            proj, fc2 = (name.format(i=i) for name in _SINGLE)
            if fc2 in state and state[fc2].dim() == 2:
                state[proj], state[fc2] = state[fc2].tensor_split([config.dim], dim=1)
        weight = state.get("patch_embed.proj.weight")
        if weight is not None and weight.dim() == 2 and weight.shape[1] % config.patch**2 == 0:
            state["patch_embed.proj.weight"] = weight.unflatten(1, (-1, *[config.patch] * 2))
        return state

    return to_ours


def _writer(names: Callable[[Any], Layout], blocks: str) -> Callable[[StateDict, Any], StateDict]:
    def from_ours(state: StateDict, config: Any) -> StateDict:
        state = dict(state)
        for i in range(config.doubles, config.depth):
            proj, fc2 = (name.format(i=i) for name in _SINGLE)
            if proj in state and fc2 in state:
                state[fc2] = torch.cat([state.pop(proj), state[fc2]], dim=1)
        if "patch_embed.proj.weight" in state:
            state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
        return _numbered(names(config).from_ours(state, config), blocks, -config.doubles)

    return from_ours


def _turned(change: Callable[[StateDict, Any], StateDict]) -> Callable[[StateDict, Any], StateDict]:
    """Their last modulation scales, then shifts; ours, as the official code, the other way."""

    def turned(state: StateDict, config: Any) -> StateDict:
        out = change(state, config)
        for stem in ("final.modulation.linear", "norm_out.linear"):
            for key in (f"{stem}.weight", f"{stem}.bias"):
                if key in out:
                    out[key] = torch.cat(out[key].chunk(2)[::-1])
        return out

    return turned


def _strange_diffusers(config: Any) -> dict[str, str]:
    """Its networks are four times as wide as the tokens."""
    found = _FORM.strange(config)
    if "ffn" not in found and config.ffn.width(config.dim) != 4 * config.dim:
        found["ffn.ratio"] = f"ffn of width {config.ffn.width(config.dim)} ({4 * config.dim} there)"
    return found


def _options(config: Any) -> Mapping[str, Any]:
    cells, width = config.patch**2, config.dim // config.heads
    made = GridRope(config.rope, width, heads=config.heads, depth=config.depth, axes=3)
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": cells * (config.channels + config.condition_channels),
        "out_channels": cells * config.channels,
        "num_layers": config.doubles,
        "num_single_layers": config.depth - config.doubles,
        "attention_head_dim": width,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.text_dim,
        "pooled_projection_dim": config.pooled_dim,
        "guidance_embeds": config.guidance,
        "axes_dims_rope": (list(made.widths), made.widths),
    }


OFFICIAL = Layout(
    name="official",
    recognise=_OFFICIAL,
    to_ours=_reader(_official, "single_blocks"),
    from_ours=_writer(_official, "single_blocks"),
    strange=_FORM.strange,
)
DIFFUSERS = Layout(
    name="diffusers",
    recognise=_DIFFUSERS,
    to_ours=_turned(_reader(_diffusers, "single_transformer_blocks")),
    from_ours=_turned(_writer(_diffusers, "single_transformer_blocks")),
    strange=_strange_diffusers,
    options=_options,
)
