"""Key layouts of Wan: the official one and diffusers' ``WanTransformer3DModel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

from .forms import SIZES, Form

__all__ = ["DIFFUSERS", "OFFICIAL"]

_BLOCK, _TABLE = "blocks.{i}", "modulation.table"
_FORM = Form(
    free=(
        *SIZES, "frames", "size", "channels", "condition_channels", "patch", "text_dim", "text_length",
        "ffn.ratio", "ffn.hidden", "block.cross_norm",
    ),
)  # fmt: skip


def _names(
    name: str,
    mixers: Mapping[str, str],
    parts: tuple[str, str],
    others: Mapping[str, str],
    tables: tuple[str, str],
    recognised: tuple[str, ...],
) -> Layout:
    """The names, and tables of modulation that have an axis for the batch.

    Args:
        name: name of the layout.
        mixers: branch -> its name there.
        parts: in front of q, k and v, and the last layer of a mixer.
        others: our beginnings of keys -> theirs.
        tables: names of the table of a block, and of that of the last layer.
        recognised: keys that only this layout has.
    """
    (front, last), pairs, rows = parts, list(others.items()), []
    for branch, there in mixers.items():
        ours, theirs = f"{_BLOCK}.{branch}.part", f"{_BLOCK}.{there}"
        pairs += [(f"{ours}.{x}_norm", f"{theirs}.norm_{x}") for x in "qk"]
        pairs += [(f"{ours}.proj", f"{theirs}.{last}"), (f"{ours}.q", f"{theirs}.{front}q")]
        fused = "kv" if branch == "cross" else "qkv"
        pieces = tuple(f"{theirs}.{front}{x}.{{kind}}" for x in fused)
        rows.append(Rows((f"{ours}.{fused}.{{kind}}",), pieces))
    pairs.append((f"{_BLOCK}.modulation.table", f"{_BLOCK}.{tables[0]}"))
    pairs.append(("final.modulation.table", tables[1]))
    plain = renamed(name, pairs, recognise=has_keys(*recognised), rows=rows)

    def to_ours(state: StateDict, config: Any) -> StateDict:
        out = plain.to_ours(state, config)
        return {k: v[0] if k.endswith(_TABLE) and len(v) == 1 else v for k, v in out.items()}

    def from_ours(state: StateDict, config: Any) -> StateDict:
        given = {k: v[None] if k.endswith(_TABLE) else v for k, v in state.items()}
        return plain.from_ours(given, config)

    return Layout(
        name=name,
        recognise=plain.recognise,
        to_ours=to_ours,
        from_ours=from_ours,
        strange=_FORM.strange,
        options=_OPTIONS[name],
    )


def _hidden(config: Any) -> int:
    width: int = config.ffn.width(config.dim)
    return width


def _of_official(config: Any) -> Mapping[str, Any]:
    """Options of Wan's ``WanModel``; its ``config.json`` leaves out those of the patches and norms."""
    return {
        "_class_name": "WanModel",
        "dim": config.dim,
        "ffn_dim": _hidden(config),
        "num_heads": config.heads,
        "num_layers": config.depth,
        "in_dim": config.channels + config.condition_channels,
        "out_dim": config.channels,
        "text_dim": config.text_dim,
        "freq_dim": 256,
        "eps": 1e-6,
    }


def _of_diffusers(config: Any) -> Mapping[str, Any]:
    """Options of diffusers' ``WanTransformer3DModel``."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": (list(config.patch), tuple(config.patch)),
        "num_attention_heads": config.heads,
        "attention_head_dim": config.dim // config.heads,
        "in_channels": config.channels + config.condition_channels,
        "out_channels": config.channels,
        "text_dim": config.text_dim,
        "freq_dim": 256,
        "ffn_dim": _hidden(config),
        "num_layers": config.depth,
        "cross_attn_norm": config.block.cross_norm,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
    }


_OPTIONS = {"official": _of_official, "diffusers": _of_diffusers}

OFFICIAL = _names(
    "official",
    {"attn": "self_attn", "cross": "cross_attn"},
    ("", "o"),
    {
        "patch_embed.proj": "patch_embedding",
        "text_embed": "text_embedding",
        "time_embed.fc1": "time_embedding.0",
        "time_embed.fc2": "time_embedding.2",
        "modulation": "time_projection.1",
        f"{_BLOCK}.cross.norm": f"{_BLOCK}.norm3",
        f"{_BLOCK}.ffn.part.fc1": f"{_BLOCK}.ffn.0",
        f"{_BLOCK}.ffn.part.fc2": f"{_BLOCK}.ffn.2",
        "final.linear": "head.head",
    },
    ("modulation", "head.modulation"),
    ("patch_embedding.weight", "time_projection.1.weight", "head.head.weight"),
)
DIFFUSERS = _names(
    "diffusers",
    {"attn": "attn1", "cross": "attn2"},
    ("to_", "to_out.0"),
    {
        "patch_embed.proj": "patch_embedding",
        "text_embed.0": "condition_embedder.text_embedder.linear_1",
        "text_embed.2": "condition_embedder.text_embedder.linear_2",
        "time_embed.fc1": "condition_embedder.time_embedder.linear_1",
        "time_embed.fc2": "condition_embedder.time_embedder.linear_2",
        "modulation": "condition_embedder.time_proj",
        f"{_BLOCK}.cross.norm": f"{_BLOCK}.norm2",
        f"{_BLOCK}.ffn.part.fc1": f"{_BLOCK}.ffn.net.0.proj",
        f"{_BLOCK}.ffn.part.fc2": f"{_BLOCK}.ffn.net.2",
        "final.linear": "proj_out",
    },
    ("scale_shift_table", "scale_shift_table"),
    ("patch_embedding.weight", "condition_embedder.time_proj.weight", "proj_out.weight"),
)
