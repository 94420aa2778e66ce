"""Key layout of STARFlow's official checkpoints.

Their root-mean-square norms multiply by 1 + w, ours by w. What a checkpoint carries and does not use
(masks, the rotary tables of a grid) is left out.
"""

from __future__ import annotations

import re
from typing import Any

from effformer.layout import Layout, Rows, StateDict, renamed

from .forms import SIZES, Form
from .tarflow import MAPS, NETWORK, counted, numbered

__all__ = ["OFFICIAL"]

_UNUSED = re.compile(r"feat_rope\.freqs_(cos|sin)|var|blocks\.\d+\.attn_mask")
_GAINS = re.compile(r"(blocks\.\d+\.attn\.part\.[qk]_norm|flows\.\d+\.norm)\.weight")
_NORMS = re.compile(r"blocks\.\d+\.(attn|ffn)\.norm\.weight")
_RECOGNISE = re.compile(r"blocks\.\d+\.sos_embed")
_PAIRS = (
    ("blocks.{i}.attn.part.q_norm", "layer.{i}.attention.query_norm"),
    ("blocks.{i}.attn.part.k_norm", "layer.{i}.attention.key_norm"),
    *MAPS,
    ("flows.{i}.start", "blocks.{i}.sos_embed"),
    ("flows.{i}.proj_text", "blocks.{i}.proj_txt"),
    ("flows.{i}.norm", "blocks.{i}.final_norm"),
)
_GATE = Rows(
    ours=("blocks.{i}.ffn.part.fc1.{kind}",),
    theirs=("layer.{i}.mlp.gate_proj.{kind}", "layer.{i}.mlp.up_proj.{kind}"),
)


def _recognise(keys: Any) -> bool:
    return any(map(_RECOGNISE.fullmatch, keys))


_PLAIN = renamed("official", (*NETWORK, *_PAIRS), recognise=_recognise)
_GATED = renamed(
    "official",
    (("blocks.{i}.ffn.part.fc2", "layer.{i}.mlp.down_proj"), *NETWORK, *_PAIRS),
    recognise=_recognise,
    rows=[_GATE],
)


def _names(config: Any) -> Layout:
    return _GATED if config.ffn is not None and config.ffn.entry.name == "geglu" else _PLAIN


def _shifted(state: StateDict, config: Any, by: float) -> StateDict:
    """With another zero of the gains of root-mean-square norms."""
    kinds = [_GAINS] if config.norm == "layer" else [_GAINS, _NORMS]
    return {
        key: value + by if any(kind.fullmatch(key) for kind in kinds) else value
        for key, value in state.items()
    }


def _to_ours(state: StateDict, config: Any) -> StateDict:
    used = {key: value for key, value in state.items() if not _UNUSED.fullmatch(key)}
    return _shifted(_names(config).to_ours(counted(used, config), config), config, 1.0)


def _from_ours(state: StateDict, config: Any) -> StateDict:
    made = _names(config).from_ours(_shifted(state, config, -1.0), config)
    return numbered(made, config)


_FORM = Form(
    free=(
        *SIZES, "input_size", "channels", "patch", "text_dim", "text_length", "norm", "last_norm", "clip",
        "scale", "first", "attn.kv_heads", "attn.qkv_bias", "attn.proj_bias", "ffn.ratio", "ffn.hidden",
        "ffn.bias",
    ),
    choices={
        "flows": lambda flows: True,
        "ffn": ("geglu",),
        "ffn.act": ("gelu", "gelu-tanh"),
        "attn.qk_norm": (True, False),
    },
)  # fmt: skip


def _strange(config: Any) -> dict[str, str]:
    """Biases are everywhere or nowhere, and each network has one activation."""
    found = _FORM.strange(config)
    if "ffn" in found or "attn" in found:
        return found
    usual = "gelu-tanh" if config.ffn.entry.name == "geglu" else "gelu"
    if config.ffn.act != usual:
        found["ffn.act"] = f"ffn.act={config.ffn.act!r} ({usual!r} there)"
    if len({config.attn.qkv_bias, config.attn.proj_bias, config.ffn.bias}) > 1:
        found["attn.qkv_bias"] = "some biases and not others (all or none there)"
    return found


OFFICIAL = Layout(
    name="official",
    recognise=_recognise,
    to_ours=_to_ours,
    from_ours=_from_ours,
    strange=_strange,
)
