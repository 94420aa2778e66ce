"""Key layouts of Macaron Net (fairseq): single layers, the translation and the BERT-style model.

``layer_norms`` of an encoder layer are numbered 0 attention, 1 trailing FFN, 2 leading FFN, which
is not their order of use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from effformer.checks import FormatError
from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

from .forms import SIZES, Form

__all__ = [
    "BERT",
    "DECODER_LAYER",
    "ENCODER_LAYER",
    "PLAIN_DECODER_LAYER",
    "PLAIN_ENCODER_LAYER",
    "TRANSLATION",
]

_SELF = [("attn.part.proj", "self_attn.out_proj")]
_SELF_ROWS = [Rows(("attn.part.qkv.{kind}",), ("self_attn.in_proj_{kind}",))]
_HALVES = [
    ("ffn1.part.fc1", "macaron_fc1"),
    ("ffn1.part.fc2", "macaron_fc2"),
    ("ffn2.part.fc1", "fc1"),
    ("ffn2.part.fc2", "fc2"),
]
_ENCODER = [
    *_SELF,
    *_HALVES,
    ("attn.norm", "layer_norms.0"),
    ("ffn2.norm", "layer_norms.1"),
    ("ffn1.norm", "layer_norms.2"),
]
_PLAIN = [
    *_SELF,
    ("ffn.part.fc1", "fc1"),
    ("ffn.part.fc2", "fc2"),
    ("attn.norm", "layer_norms.0"),
    ("ffn.norm", "layer_norms.1"),
]
_CROSS = [
    *_SELF,
    ("cross.part.proj", "encoder_attn.out_proj"),
    ("attn.norm", "self_attn_layer_norm"),
    ("cross.norm", "encoder_attn_layer_norm"),
]
_CROSS_ROWS = [
    *_SELF_ROWS,
    Rows(
        ("cross.part.q.{kind}", "cross.part.kv.{kind}"),
        ("encoder_attn.in_proj_{kind}",),
        shares=(1, 2),
    ),
]
_DECODER = [
    *_CROSS,
    *_HALVES,
    ("ffn2.norm", "final_layer_norm"),
    ("ffn1.norm", "macaron_layer_norm"),
]
_PLAIN_DECODER = [
    *_CROSS,
    ("ffn.part.fc1", "fc1"),
    ("ffn.part.fc2", "fc2"),
    ("ffn.norm", "final_layer_norm"),
]

ENCODER_LAYER = renamed(
    "fairseq",
    _ENCODER,
    rows=_SELF_ROWS,
    recognise=has_keys("self_attn.in_proj_weight", "macaron_fc1.weight"),
)
"""One Macaron block of an encoder."""

PLAIN_ENCODER_LAYER = renamed(
    "fairseq", _PLAIN, rows=_SELF_ROWS, recognise=has_keys("self_attn.in_proj_weight", "fc1.weight")
)
"""One ordinary block of an encoder."""

DECODER_LAYER = renamed(
    "fairseq",
    _DECODER,
    rows=_CROSS_ROWS,
    recognise=has_keys("encoder_attn.in_proj_weight", "macaron_fc1.weight"),
)
"""One Macaron block of a decoder."""

PLAIN_DECODER_LAYER = renamed(
    "fairseq",
    _PLAIN_DECODER,
    rows=_CROSS_ROWS,
    recognise=has_keys("encoder_attn.in_proj_weight", "fc1.weight"),
)
"""One ordinary block of a decoder."""


def _below(
    ours: str, theirs: str, pairs: Iterable[tuple[str, str]], rows: Iterable[Rows]
) -> tuple[list[tuple[str, str]], list[Rows]]:
    """The names of a layer as names in a stack of layers."""
    moved = [
        Rows(
            tuple(f"{ours}.{{i}}.{name}" for name in row.ours),
            tuple(f"{theirs}.{{i}}.{name}" for name in row.theirs),
            row.shares,
        )
        for row in rows
    ]
    return [(f"{ours}.{{i}}.{a}", f"{theirs}.{{i}}.{b}") for a, b in pairs], moved


def _stacks(plain: bool) -> tuple[list[tuple[str, str]], list[Rows]]:
    encoder = _below("encoder.blocks", "encoder.layers", _PLAIN if plain else _ENCODER, _SELF_ROWS)
    decoder = _below(
        "decoder.blocks", "decoder.layers", _PLAIN_DECODER if plain else _DECODER, _CROSS_ROWS
    )
    return encoder[0] + decoder[0], encoder[1] + decoder[1]


def _dropped(state: StateDict) -> StateDict:
    """Without the buffers that carry no information."""
    empty = ("version", "embed_positions._float_tensor")
    return {k: v for k, v in state.items() if not k.endswith(empty)}


def _same(state: StateDict, keys: Iterable[str], what: str) -> Tensor | None:
    """Take the copies of a shared matrix out of ``state``; None if there are none."""
    copies = [(key, state.pop(key)) for key in keys if key in state]
    for key, value in copies[1:]:
        if not torch.equal(value, copies[0][1]):
            raise FormatError(f"{key} differs from {copies[0][0]}, but this model shares {what}")
    return copies[0][1] if copies else None


def _translation_names(plain: bool) -> Layout:
    pairs, rows = _stacks(plain)
    pairs += [
        ("encoder.norm", "encoder.layer_norm"),
        ("decoder.norm", "decoder.layer_norm"),
        ("positions", "encoder.embed_positions"),
        ("target_positions", "decoder.embed_positions"),
    ]
    return renamed("fairseq", pairs, rows=rows, recognise=has_keys("encoder.layers.0.fc1.weight"))


_TRANSLATION = {plain: _translation_names(plain) for plain in (False, True)}
_TABLES = {
    "encoder.embed_tokens.weight": "embed.weight",
    "decoder.embed_tokens.weight": "target_embed.weight",
    "decoder.embed_out": "head.weight",
}


def _is_plain(state: StateDict, key: str) -> bool:
    return not any(key in name for name in state)


def _translation_to_ours(state: StateDict, config: Any) -> StateDict:
    state = _dropped(state)
    tables: StateDict = {}
    if config.share == "all":
        shared = _same(state, list(_TABLES), "one table")
        tables = {} if shared is None else {"embed.weight": shared}
    elif config.share == "target":
        shared = _same(state, list(_TABLES)[1:], "the target's table with the output")
        tables = {} if shared is None else {"target_embed.weight": shared}
    for theirs, ours in _TABLES.items():
        if theirs in state:
            tables[ours] = state.pop(theirs)
    names = _TRANSLATION[_is_plain(state, "macaron_fc1")]
    return tables | names.to_ours(state, config)


def _translation_from_ours(state: StateDict, config: Any) -> StateDict:
    state = dict(state)
    tables = {theirs: state.pop(ours) for theirs, ours in _TABLES.items() if ours in state}
    if config.share == "all" and tables:
        tables["decoder.embed_tokens.weight"] = tables["encoder.embed_tokens.weight"]
    return tables | _TRANSLATION[_is_plain(state, "ffn1")].from_ours(state, config)


_BODY = (*SIZES, "vocab", "pad", "positions", "context", "final_norm", "ffn.ratio", "ffn.hidden")
_BLOCKS = {"block": ("macaron", "prenorm", "postnorm"), "block.post_norm": (True, False)}
_TRANSLATION_FORM = Form(
    free=(
        *_BODY, "decoder_depth", "decoder_heads", "decoder_final_norm", "target_vocab", "share", "source_padding",
        "target_padding", "decoder_positions", "decoder_context", "block.share", "block.first_hidden",
        "decoder_layers",
    ),
    choices=_BLOCKS,
)  # fmt: skip


def _translation_options(config: Any) -> Mapping[str, Any]:
    before = config.block.entry.name == "prenorm" or not getattr(config.block, "post_norm", True)
    heads = config.decoder_heads or config.heads
    return {
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": heads,
        "encoder_normalize_before": before,
        "decoder_normalize_before": before,
        "encoder_learned_pos": config.positions == "learned",
        "decoder_learned_pos": (config.decoder_positions or config.positions) == "learned",
        "no_token_positional_embeddings": config.positions == "none",
    }


def _translation_strange(config: Any) -> dict[str, str]:
    """Blocks of the encoder, and those of the decoder, which may be of other widths."""
    found = _TRANSLATION_FORM.strange(config)
    if config.decoder_layers:
        depth = config.decoder_depth or config.depth
        changed = config.replace(layers=config.decoder_layers, decoder_layers={}, depth=depth)
        found |= replace(_TRANSLATION_FORM, layers=True).strange(changed)
    return found


TRANSLATION = Layout(
    name="fairseq",
    recognise=has_keys("encoder.layers.0.self_attn.in_proj_weight", "encoder.embed_tokens.weight"),
    to_ours=_translation_to_ours,
    from_ours=_translation_from_ours,
    strange=_translation_strange,
    options=_translation_options,
)


def _bert_names(plain: bool) -> Layout:
    pairs, rows = _below("blocks", "encoder.layers", _PLAIN if plain else _ENCODER, _SELF_ROWS)
    pairs += [
        ("embed", "encoder.embed_tokens"),
        ("positions", "encoder.embed_positions"),
        ("segment_embed", "encoder.embed_segment"),
        ("norm", "encoder.layer_norm"),
        ("mlm.fc", "mid_layer.0"),
        ("mlm.norm", "mid_layer.2"),
        ("nsp", "classifier"),
    ]
    return renamed("fairseq", pairs, rows=rows, recognise=has_keys("encoder.embed_segment.weight"))


_BERT = {plain: _bert_names(plain) for plain in (False, True)}


def _bert_to_ours(state: StateDict, config: Any) -> StateDict:
    state = _dropped(state)
    out: StateDict = {}
    if config.tied:
        table = _same(state, ["encoder.embed_tokens.weight", "embed_out"], "one table")
        out = {} if table is None else {"embed.weight": table}
    elif "embed_out" in state:
        out = {"head.weight": state.pop("embed_out")}
    return out | _BERT[_is_plain(state, "macaron_fc1")].to_ours(state, config)


def _bert_from_ours(state: StateDict, config: Any) -> StateDict:
    state = dict(state)
    output = state.get("embed.weight") if config.tied else state.pop("head.weight", None)
    out = _BERT[_is_plain(state, "ffn1")].from_ours(state, config)
    return out if output is None else out | {"embed_out": output}


BERT = Layout(
    name="fairseq",
    recognise=has_keys("encoder.embed_segment.weight", "mid_layer.0.weight"),
    to_ours=_bert_to_ours,
    from_ours=_bert_from_ours,
    strange=Form(
        free=(*_BODY, "norm_affine", "tied", "block.share", "block.first_hidden"),
        choices={**_BLOCKS, "ffn.act": ("relu",)},
    ).strange,
    options=lambda config: {"encoder_attention_heads": config.heads},
)
