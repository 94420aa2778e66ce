"""Key layouts of MMDiT: the official one, bare ("official") and as in the released files of one piece
("single-file"), and that of diffusers' ``SD3Transformer2DModel``.

The heads of the official network are 64 wide; its keys do not say so, and other widths are read and
written alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

from .forms import SIZES, Form

__all__ = ["LAYOUTS"]

_PREFIX = "model.diffusion_model."
_STREAMS = {"x": "x_block", "y": "context_block"}


def _stream(ours: str, theirs: str) -> list[tuple[str, str]]:
    here, there = f"blocks.{{i}}.{ours}", f"joint_blocks.{{i}}.{theirs}"
    return [
        *(
            (f"{here}.{attn}.part.{a}", f"{there}.{attn}.{b}")
            for attn in ("attn", "attn2")
            for a, b in (("qkv", "qkv"), ("proj", "proj"), ("q_norm", "ln_q"), ("k_norm", "ln_k"))
        ),
        (f"{here}.ffn.part", f"{there}.mlp"),
        (f"{here}.modulation.linear", f"{there}.adaLN_modulation.1"),
    ]


_OFFICIAL = renamed(
    "official",
    [
        ("patch_embed.proj", "x_embedder.proj"),
        ("pos_embed", "pos_embed"),
        ("text_embed", "context_embedder"),
        ("time_embed.fc1", "t_embedder.mlp.0"),
        ("time_embed.fc2", "t_embedder.mlp.2"),
        ("pooled_embed.0", "y_embedder.mlp.0"),
        ("pooled_embed.2", "y_embedder.mlp.2"),
        *(pair for names in _STREAMS.items() for pair in _stream(*names)),
        ("final.modulation.linear", "final_layer.adaLN_modulation.1"),
        ("final.linear", "final_layer.linear"),
    ],
    recognise=has_keys("context_embedder.weight", "joint_blocks.0.x_block.attn.qkv.weight"),
)


def _turned(state: StateDict, config: Any) -> StateDict:
    """Of three branches, theirs modulate the second attention last and ours the FFN; both ways."""
    out = dict(state)
    for key, value in state.items():
        if ".x.modulation.linear." in key and value.shape[0] == 9 * config.dim:
            first, second, third = value.chunk(3)
            out[key] = torch.cat([first, third, second])
    return out


def _swapped(value: Tensor) -> Tensor:
    """Shift and scale the other way round."""
    return torch.cat(value.chunk(2)[::-1])


def _from_official(state: StateDict, config: Any) -> StateDict:
    return _turned(_OFFICIAL.to_ours(state, config), config)


def _to_official(state: StateDict, config: Any) -> StateDict:
    return _OFFICIAL.from_ours(_turned(state, config), config)


_FREE = (
    *SIZES, "input_size", "channels", "patch", "text_dim", "text_length", "table_size", "table_base",
    "block.dual",
)  # fmt: skip
_NORMED = {"attn.qk_norm": (True, False), "attn.qk_norm_eps": (1e-6,)}
_OFFICIAL_FORM = Form(free=(*_FREE, "pooled_dim", "ffn.ratio", "ffn.hidden"), choices=_NORMED)
_DIFFUSERS_FORM = Form(
    free=_FREE, choices={**_NORMED, "pooled_dim": lambda width: width is not None}
)

OFFICIAL = Layout(
    name="official",
    recognise=_OFFICIAL.recognise,
    to_ours=_from_official,
    from_ours=_to_official,
    strange=_OFFICIAL_FORM.strange,
)
SINGLE = replace(
    OFFICIAL,
    name="single-file",
    recognise=has_keys(f"{_PREFIX}context_embedder.weight", f"{_PREFIX}x_embedder.proj.weight"),
    to_ours=lambda state, config: _from_official(
        {key.removeprefix(_PREFIX): value for key, value in state.items()}, config
    ),
    from_ours=lambda state, config: {
        f"{_PREFIX}{key}": value for key, value in _to_official(state, config).items()
    },
    around=("first_stage_model.", "text_encoders.", "cond_stage_model."),
)

_THEIRS = "transformer_blocks.{i}"
_QKV = {
    ("x", "attn"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("y", "attn"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("x", "attn2"): ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
_DIFFUSERS = renamed(
    "diffusers",
    [
        ("patch_embed.proj", "pos_embed.proj"),
        ("pos_embed", "pos_embed.pos_embed"),
        ("text_embed", "context_embedder"),
        ("time_embed.fc1", "time_text_embed.timestep_embedder.linear_1"),
        ("time_embed.fc2", "time_text_embed.timestep_embedder.linear_2"),
        ("pooled_embed.0", "time_text_embed.text_embedder.linear_1"),
        ("pooled_embed.2", "time_text_embed.text_embedder.linear_2"),
        *(
            (f"blocks.{{i}}.{ours}", f"{_THEIRS}.{theirs}")
            for ours, theirs in (
                ("x.attn.part.proj", "attn.to_out.0"),
                ("x.attn.part.q_norm", "attn.norm_q"),
                ("x.attn.part.k_norm", "attn.norm_k"),
                ("y.attn.part.proj", "attn.to_add_out"),
                ("y.attn.part.q_norm", "attn.norm_added_q"),
                ("y.attn.part.k_norm", "attn.norm_added_k"),
                ("x.attn2.part.proj", "attn2.to_out.0"),
                ("x.attn2.part.q_norm", "attn2.norm_q"),
                ("x.attn2.part.k_norm", "attn2.norm_k"),
                ("x.ffn.part.fc1", "ff.net.0.proj"),
                ("x.ffn.part.fc2", "ff.net.2"),
                ("y.ffn.part.fc1", "ff_context.net.0.proj"),
                ("y.ffn.part.fc2", "ff_context.net.2"),
                ("x.modulation.linear", "norm1.linear"),
                ("y.modulation.linear", "norm1_context.linear"),
            )
        ),
        ("final.modulation.linear", "norm_out.linear"),
        ("final.linear", "proj_out"),
    ],
    recognise=has_keys("context_embedder.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    rows=[
        Rows(
            ours=(f"blocks.{{i}}.{stream}.{attn}.part.qkv.{{kind}}",),
            theirs=tuple(f"{_THEIRS}.{name}.{{kind}}" for name in names),
        )
        for (stream, attn), names in _QKV.items()
    ],
)


def _halves(state: StateDict, config: Any) -> StateDict:
    """The two modulations of two vectors hold the scale first there, the shift here; both ways."""
    places = ("final.modulation.linear", f"blocks.{config.depth - 1}.y.modulation.linear")
    keys = {f"{place}.{kind}" for place in places for kind in ("weight", "bias")}
    return {key: _swapped(value) if key in keys else value for key, value in state.items()}


def _from_diffusers(state: StateDict, config: Any) -> StateDict:
    return _turned(_halves(_DIFFUSERS.to_ours(state, config), config), config)


def _to_diffusers(state: StateDict, config: Any) -> StateDict:
    return _DIFFUSERS.from_ours(_halves(_turned(state, config), config), config)


def _options(config: Any) -> Mapping[str, Any]:
    dual = list(range(min(config.block.dual, config.depth)))
    return {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.dim // config.heads,
        "patch_size": config.patch,
        "pos_embed_max_size": config.table_size,
        "dual_attention_layers": (dual, tuple(dual)),
        "qk_norm": "rms_norm" if config.attn.qk_norm else None,
    }


DIFFUSERS = Layout(
    name="diffusers",
    recognise=_DIFFUSERS.recognise,
    to_ours=_from_diffusers,
    from_ours=_to_diffusers,
    strange=_DIFFUSERS_FORM.strange,
    options=_options,
)
LAYOUTS = (OFFICIAL, SINGLE, DIFFUSERS)
