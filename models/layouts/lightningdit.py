"""Key layout of LightningDiT's official checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from effformer.blocks import head_width
from effformer.checks import FormatError
from effformer.layout import Layout, StateDict, has_keys, renamed
from effformer.nn.rope import GridRope

from .dit import FLOW, LATENT, NAMES, SQUARE, check_positions
from .forms import Form, same_table

__all__ = ["GATED", "NORMS", "OFFICIAL"]

NORMS = (
    ("blocks.{i}.attn.norm", "blocks.{i}.norm1"),
    ("blocks.{i}.ffn.norm", "blocks.{i}.norm2"),
    ("final.norm", "final_layer.norm_final"),
)
GATED = (
    ("blocks.{i}.ffn.part.fc1", "blocks.{i}.mlp.w12"),
    ("blocks.{i}.ffn.part.fc2", "blocks.{i}.mlp.w3"),
)
_RECOGNISE = has_keys("x_embedder.proj.weight", "t_embedder.mlp.0.weight")
_PLAIN = renamed("official", (*NORMS, *NAMES), recognise=_RECOGNISE)
_SWIGLU = renamed("official", (*NORMS, *GATED, *NAMES), recognise=_RECOGNISE)
_TABLES = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")


def _names(config: Any) -> Layout:
    return _SWIGLU if config.ffn.entry.name == "swiglu" else _PLAIN


def _tables(config: Any) -> StateDict:
    """The rotary tables (N, K), which official checkpoints carry as buffers."""
    if config.rope is None:
        return {}
    rope = GridRope(config.rope, head_width(config), heads=config.heads, depth=config.depth)
    (table,) = rope(rope.positions(config.grid), like=torch.empty(0))
    return dict(zip(_TABLES, (table.cos, table.sin), strict=True))


def _to_ours(state: StateDict, config: Any) -> StateDict:
    """Rename; tables are checked, since the model computes its own."""
    state = dict(state)
    for key, expected in _tables(config).items():
        table = state.pop(key, expected)
        if not same_table(table, expected):
            raise FormatError(f"{key} is not the rotary table of this model's grid and heads")
    return check_positions(_names(config).to_ours(state, config), config)


def _from_ours(state: StateDict, config: Any) -> StateDict:
    return _names(config).from_ours(state, config) | _tables(config)


_FORM = Form(
    # the rotary tables are in the file
    free=(
        *LATENT,
        "block.shift",
        "norm",
        "rope.kind",
        "rope.temperature",
        "rope.first",
        "rope.offset",
        "rope.reference",
        "attn.head_dim",
    ),
    choices={**SQUARE, "ffn": ("swiglu", "mlp"), "rope": (None,), "attn.qk_norm": (True, False)},
)


def _strange(config: Any) -> dict[str, str]:
    """Norms of queries and keys have the epsilon of their kind, wherever it comes from."""
    found = _FORM.strange(config)
    found.pop("attn.qk_norm_eps", None)
    if getattr(config.attn, "qk_norm", False):
        usual, eps = {"rms": 1e-6, "layer": 1e-5}[config.norm], config.attn.qk_norm_eps or 1e-6
        if eps != usual:
            found["attn.qk_norm_eps"] = (
                f"attn.qk_norm_eps={eps} with norm={config.norm!r} ({usual} there)"
            )
    return found


def _options(config: Any) -> Mapping[str, Any]:
    return {
        **FLOW,
        "use_qknorm": config.attn.qk_norm,
        "use_swiglu": config.ffn.entry.name == "swiglu",
        "use_rope": config.rope is not None,
        "use_rmsnorm": config.norm == "rms",
        "wo_shift": not config.block.shift,
    }


OFFICIAL = Layout(
    name="official",
    recognise=_RECOGNISE,
    to_ours=_to_ours,
    from_ours=_from_ours,
    strange=_strange,
    options=_options,
)
