"""Key layout of DiT-DH's official checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from effformer.blocks import head_width
from effformer.checks import FormatError
from effformer.layout import Layout, StateDict, has_keys, renamed
from effformer.nn.rope import GridRope

from .dit import LATENT, NAMES, SQUARE, check_positions
from .forms import Form, same_table
from .lightningdit import GATED, NORMS

__all__ = ["OFFICIAL"]

_OWN = {
    "patch_embed.proj": "s_embedder.proj",
    "wide_embed.proj": "x_embedder.proj",
    "to_wide": "s_projector",
    "time_embed.frequencies": "t_embedder.W",
    "time_embed.fc1": "t_embedder.mlp.0",
    "time_embed.fc2": "t_embedder.mlp.2",
}
_NAMES = renamed(
    "official",
    (*_OWN.items(), *NORMS, *GATED, *(pair for pair in NAMES if pair[0] not in _OWN)),
    recognise=has_keys("s_embedder.proj.weight", "s_projector.weight", "t_embedder.W"),
)


def _tables(config: Any) -> StateDict:
    """The rotary tables (N, K), which official checkpoints carry as buffers."""
    if config.rope is None:
        return {}
    found: StateDict = {}
    for name, one in (("enc", config), ("dec", config.wide)):
        rope = GridRope(config.rope, head_width(one), heads=one.heads, depth=one.depth)
        (table,) = rope(rope.positions(config.grid), like=torch.empty(0))
        found[f"{name}_feat_rope.freqs_cos"] = table.cos
        found[f"{name}_feat_rope.freqs_sin"] = table.sin
    return found


def _to_ours(state: StateDict, config: Any) -> StateDict:
    """Rename; tables are checked, since the model computes its own."""
    state = dict(state)
    for key, expected in _tables(config).items():
        if not same_table(state.pop(key, expected), expected):
            raise FormatError(f"{key} is not the rotary table of this model's grid and heads")
    return check_positions(_NAMES.to_ours(state, config), config)


def _from_ours(state: StateDict, config: Any) -> StateDict:
    return _NAMES.from_ours(state, config) | _tables(config)


OFFICIAL = Layout(
    name="official",
    recognise=_NAMES.recognise,
    to_ours=_to_ours,
    from_ours=_from_ours,
    strange=Form(
        free=(*LATENT, "wide_*", "rope.*", "attn.head_dim"),
        choices={**SQUARE, "rope": (None,), "attn.qk_norm": (True, False), "attn.qk_norm_eps": (1e-6,)},
    ).strange,
)  # fmt: skip
