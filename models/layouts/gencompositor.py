"""Key layouts of GenCompositor: one block, and both networks, with their folders' names in front of the
keys, ``{"transformer." + key: ...} | {"branch." + key: ...}``.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

from .forms import SIZES, Form

__all__ = ["BLOCK", "OFFICIAL"]


def _block(ours: str, theirs: str) -> tuple[list[tuple[str, str]], Rows]:
    """Names of a block, ``ours`` and ``theirs`` in front of them, and its fused projection."""
    names = (
        ("attn.norm", "norm1.norm"), ("attn.part.q_norm", "attn1.norm_q"),
        ("attn.part.k_norm", "attn1.norm_k"), ("attn.part.proj", "attn1.to_out.0"),
        ("ffn.norm", "norm2.norm"), ("ffn.part.fc1", "ff.net.0.proj"), ("ffn.part.fc2", "ff.net.2"),
        ("modulation.linear", "norm1.linear"), ("y_modulation.linear", "norm2.linear"),
    )  # fmt: skip
    pieces = tuple(f"{theirs}attn1.to_{x}.{{kind}}" for x in "qkv")
    rows = Rows((f"{ours}attn.part.qkv.{{kind}}",), pieces)
    return [(f"{ours}{a}", f"{theirs}{b}") for a, b in names], rows


_FIRST = re.compile(r"(|.*\.)norm1\.linear\.(weight|bias)")


def _sorted(state: StateDict) -> StateDict:
    """Theirs modulate by branch, ours by stream: (attention: x, y), (FFN: x, y) against (x: attention,
    FFN), (y: attention, FFN). The map is its own inverse.
    """
    out = dict(state)
    for key, first in state.items():
        match = _FIRST.fullmatch(key)
        second = state.get(f"{match[1]}norm2.linear.{match[2]}") if match else None
        if match is None or second is None:  # reported by whoever loads it
            continue
        (a, b), (c, d) = first.chunk(2), second.chunk(2)
        out[key] = torch.cat([a, c])
        out[f"{match[1]}norm2.linear.{match[2]}"] = torch.cat([b, d])
    return out


def _with_streams(plain: Layout, **options: Any) -> Layout:
    return Layout(
        name=plain.name,
        recognise=plain.recognise,
        to_ours=lambda state, config: plain.to_ours(_sorted(state), config),
        from_ours=lambda state, config: _sorted(plain.from_ours(state, config)),
        **options,
    )


_PAIRS, _ROWS = _block("", "")
BLOCK = _with_streams(
    renamed(
        "official",
        _PAIRS,
        rows=[_ROWS],
        recognise=has_keys("norm1.linear.weight", "attn1.to_q.weight"),
    )
)
"""One `effformer.blocks.ExpertAdaLN`."""


def _network() -> Layout:
    pairs, rows = [], []
    for ours, theirs in (("", "transformer."), ("branch.", "branch.")):
        names, row = _block(f"{ours}blocks.{{i}}.", f"{theirs}transformer_blocks.{{i}}.")
        pairs += names
        rows.append(row)
        pairs += [
            (f"{ours}stem.{a}", f"{theirs}{b}")
            for a, b in (
                ("patch_embed.proj", "patch_embed.proj"),
                ("text_embed", "patch_embed.text_proj"),
                ("pos_embed", "patch_embed.pos_embedding"),
                ("time_embed.fc1", "time_embedding.linear_1"),
                ("time_embed.fc2", "time_embedding.linear_2"),
            )
        ]
    pairs += [
        ("foreground_embed.proj", "transformer.patch_embed.fg_proj"),
        ("branch.outs.{i}", "branch.branch_blocks.{i}"),
        ("norm", "transformer.norm_final"),
        ("final.norm", "transformer.norm_out.norm"),
        ("final.modulation.linear", "transformer.norm_out.linear"),
        ("final.linear", "transformer.proj_out"),
    ]
    recognise = has_keys("transformer.patch_embed.fg_proj.weight", "branch.branch_blocks.0.weight")
    return renamed("official", pairs, recognise=recognise, rows=rows)


_FORM = Form(
    free=(
        *SIZES, "branch_depth", "frames", "size", "channels", "patch", "text_dim", "text_length",
        "time_dim", "rope.widths", "ffn.ratio", "ffn.hidden",
    ),
    choices={"order": ("release",)},
)  # fmt: skip

OFFICIAL = _with_streams(
    _network(),
    strange=_FORM.strange,
    around=(
        "branch.branch_x_embedder.", "branch.norm_final.", "branch.norm_out.", "branch.proj_out.",
    ),
)  # fmt: skip
"""The whole network; what the branch has beside it is never used there, and left out."""
