"""Key layouts of the published Flowformer code: attention alone, GPT-style, vision."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate
from typing import Any

from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

from .forms import SIZES, Form

__all__ = ["ATTENTION", "CROSS_ATTENTION", "GPT", "VISION", "VISION_ATTENTION"]

_QUERY, _KEY, _VALUE = (f"{x}_projection.{{kind}}" for x in ("query", "key", "value"))
_ALONE = has_keys("query_projection.weight", "out_projection.weight")

ATTENTION = renamed(
    "flow-attention",
    [("proj", "out_projection")],
    rows=[Rows(("qkv.{kind}",), (_QUERY, _KEY, _VALUE))],
    recognise=_ALONE,
)
"""One self-attention: four separate projections."""

CROSS_ATTENTION = renamed(
    "flow-attention",
    [("proj", "out_projection"), ("q", "query_projection")],
    rows=[Rows(("kv.{kind}",), (_KEY, _VALUE))],
    recognise=_ALONE,
)
"""The same projections in a cross-attention."""

VISION_ATTENTION = renamed(
    "flow-attention-vision",
    [("qkv", "qkv"), ("proj", "proj")],
    recognise=has_keys("qkv.weight", "proj.weight"),
)
"""One attention of the vision model: a fused projection."""

_BLOCK = "transformer.h.{i}"
GPT = renamed(
    "official",
    [
        ("embed", "transformer.wte"),
        ("positions", "transformer.wpe"),
        ("blocks.{i}.attn.norm", f"{_BLOCK}.ln_1"),
        ("blocks.{i}.attn.part.proj", f"{_BLOCK}.attn.out_projection"),
        ("blocks.{i}.ffn.norm", f"{_BLOCK}.ln_2"),
        ("blocks.{i}.ffn.part.fc1", f"{_BLOCK}.mlp.c_fc"),
        ("blocks.{i}.ffn.part.fc2", f"{_BLOCK}.mlp.c_proj"),
        ("norm", "transformer.ln_f"),
        ("head", "lm_head"),
    ],
    rows=[
        Rows(
            ("blocks.{i}.attn.part.qkv.{kind}",),
            tuple(f"{_BLOCK}.attn.{name}" for name in (_QUERY, _KEY, _VALUE)),
        )
    ],
    recognise=has_keys("transformer.wte.weight", "transformer.h.0.attn.query_projection.weight"),
)
GPT = replace(
    GPT,
    strange=Form(free=(*SIZES, "vocab", "context")).strange,
    options=lambda config: {"n_head": config.heads},
)

_FLAT = renamed(
    "official",
    [
        ("blocks.{i}.attn.norm", "blocks.{i}.norm1"),
        ("blocks.{i}.attn.part", "blocks.{i}.attn"),
        ("blocks.{i}.ffn.norm", "blocks.{i}.norm2"),
        ("blocks.{i}.ffn.part", "blocks.{i}.mlp"),
        ("blocks.{i}.ffn.layer_scale", "blocks.{i}.gamma"),
        *((name, name) for name in ("pos_embed", "patch_embed.{i}", "norm", "head")),
    ],
    recognise=has_keys("patch_embed.0.proj.weight", "blocks.0.0.attn.qkv.weight"),
)


def _vision_to_ours(state: StateDict, config: Any) -> StateDict:
    """Number the blocks through all stages, then rename."""
    first = [0, *accumulate(config.depths)]
    flat = {}
    for key, value in state.items():
        match = re.match(r"blocks\.(\d+)\.(\d+)\.(.+)", key)
        if match and int(match[1]) < len(config.depths):
            key = f"blocks.{first[int(match[1])] + int(match[2])}.{match[3]}"
        flat[key] = value
    return _FLAT.to_ours(flat, config)


def _vision_from_ours(state: StateDict, config: Any) -> StateDict:
    places = [(s, j) for s, depth in enumerate(config.depths) for j in range(depth)]
    out = {}
    for key, value in _FLAT.from_ours(state, config).items():
        if match := re.match(r"blocks\.(\d+)\.(.+)", key):
            stage, place = places[int(match[1])]
            key = f"blocks.{stage}.{place}.{match[2]}"
        out[key] = value
    return out


VISION = Layout(
    name="official",
    recognise=_FLAT.recognise,
    to_ours=_vision_to_ours,
    from_ours=_vision_from_ours,
    strange=Form(
        free=(
            "dims",
            "depths",
            "heads",
            "input_size",
            "channels",
            "patch",
            "num_classes",
            "ffn.ratio",
            "ffn.hidden",
        )
    ).strange,
)
