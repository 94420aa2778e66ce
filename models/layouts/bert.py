"""Key layouts of BERT-style encoders: transformers' ``BertModel``, one layer of ByteTransformer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from effformer.checks import FormatError
from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

from .forms import ACTIVATIONS, SIZES, Form

__all__ = ["BYTETRANSFORMER_LAYER", "HUGGINGFACE", "ROBERTA"]

_LAYER = "encoder.layer.{i}"
_NAMES = renamed(
    "huggingface",
    [
        ("embed", "embeddings.word_embeddings"),
        ("positions", "embeddings.position_embeddings"),
        ("segment_embed", "embeddings.token_type_embeddings"),
        ("embed_norm", "embeddings.LayerNorm"),
        ("blocks.{i}.attn.part.proj", f"{_LAYER}.attention.output.dense"),
        ("blocks.{i}.attn.norm", f"{_LAYER}.attention.output.LayerNorm"),
        ("blocks.{i}.ffn.part.fc1", f"{_LAYER}.intermediate.dense"),
        ("blocks.{i}.ffn.part.fc2", f"{_LAYER}.output.dense"),
        ("blocks.{i}.ffn.norm", f"{_LAYER}.output.LayerNorm"),
        ("pooler", "pooler.dense"),
    ],
    rows=[
        Rows(
            ("blocks.{i}.attn.part.qkv.{kind}",),
            tuple(f"{_LAYER}.attention.self.{x}.{{kind}}" for x in ("query", "key", "value")),
        )
    ],
    recognise=has_keys("embeddings.word_embeddings.weight"),
)
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_OLD = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}


_PREFIXES = ("bert.", "roberta.")
_AROUND = ("cls.", "classifier.", "qa_outputs.", "lm_head.")
_POSITIONS = "embeddings.position_embeddings.weight"
_PAD = 1

_FORM = Form(
    free=(*SIZES, "vocab", "context", "segments", "norm_eps", "pooler", "ffn.ratio", "ffn.hidden"),
    choices={"ffn.act": tuple(ACTIVATIONS)},
)


def _options(config: Any, *kinds: str) -> Mapping[str, Any]:
    return {
        "model_type": kinds,
        "num_attention_heads": config.heads,
        "hidden_act": ACTIVATIONS[config.ffn.act],
        "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    }


def _plain(key: str) -> str:
    """A key without the prefix of models around the encoder, in today's spelling."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    for old, new in _OLD.items():
        if key.endswith(old):
            key = key.removesuffix(old) + new
    return key


def _recognise(state: Iterable[str]) -> bool:
    return _NAMES.recognise([_plain(key) for key in state])


def _pads(table: Tensor | None) -> bool:
    """A table of positions has an empty row for padding, as RoBERTa's have."""
    return table is not None and len(table) > _PAD and bool(table.any() and not table[_PAD].any())


def _is_roberta(state: Iterable[str]) -> bool:
    if not _recognise(state):
        return False
    tables = state if isinstance(state, Mapping) else dict.fromkeys(state)
    found = next((v for k, v in tables.items() if _plain(k) == _POSITIONS), None)
    return any(key.startswith("roberta.") for key in tables) or _pads(found)


def _to_ours(state: StateDict, config: Any) -> StateDict:
    plain = {_plain(k): v for k, v in state.items()}
    if _pads(plain.get(_POSITIONS)):
        raise FormatError(
            f"{_POSITIONS} begins behind an empty row {_PAD}, as RoBERTa's does; layout 'roberta' reads "
            f"it into a model of context={len(plain[_POSITIONS]) - _PAD - 1}"
        )
    return _NAMES.to_ours({k: v for k, v in plain.items() if k not in _BUFFERS}, config)


def _roberta_to_ours(state: StateDict, config: Any) -> StateDict:
    """Positions count from the row behind that of padding."""
    plain = {_plain(k): v for k, v in state.items()}
    if _POSITIONS in plain:
        plain[_POSITIONS] = plain[_POSITIONS][_PAD + 1 :]
    return _NAMES.to_ours({k: v for k, v in plain.items() if k not in _BUFFERS}, config)


def _roberta_from_ours(state: StateDict, config: Any) -> StateDict:
    out = _NAMES.from_ours(state, config)
    table = out[_POSITIONS]
    out[_POSITIONS] = torch.cat([table.new_zeros(_PAD + 1, table.shape[1]), table])
    return out


HUGGINGFACE = Layout(
    name="huggingface",
    recognise=lambda state: _recognise(state) and not _is_roberta(state),
    to_ours=_to_ours,
    from_ours=_NAMES.from_ours,
    strange=_FORM.strange,
    options=lambda config: _options(config, "bert"),
    around=_AROUND,
)
ROBERTA = Layout(
    name="roberta",
    recognise=_is_roberta,
    to_ours=_roberta_to_ours,
    from_ours=_roberta_from_ours,
    strange=_FORM.strange,
    options=lambda config: {
        **_options(config, "roberta", "xlm-roberta", "camembert", "data2vec-text"),
        "pad_token_id": _PAD,
    },
    around=_AROUND,
)
"""The same network, for texts that begin in the first column; its table of positions begins with two
rows that no text uses, so ``context`` is two less than its length.
"""

_KERNELS = {
    "attn.part.qkv.weight": "qkv_kernel",
    "attn.part.qkv.bias": "qkv_bias",
    "attn.part.proj.weight": "attr_output_kernel",
    "attn.part.proj.bias": "attr_output_bias",
    "attn.norm.weight": "attr_output_layernorm_gamma",
    "attn.norm.bias": "attr_output_layernorm_beta",
    "ffn.part.fc1.weight": "inter_kernel",
    "ffn.part.fc1.bias": "inter_bias",
    "ffn.part.fc2.weight": "output_kernel",
    "ffn.part.fc2.bias": "output_bias",
    "ffn.norm.weight": "output_layernorm_gamma",
    "ffn.norm.bias": "output_layernorm_beta",
}


def _turned(state: StateDict, names: dict[str, str]) -> StateDict:
    """Rename; kernels are (in, out) there and (out, in) here."""
    named = {names.get(k, k): v for k, v in state.items()}
    return {k: v.T.contiguous() if v.dim() == 2 else v for k, v in named.items()}


BYTETRANSFORMER_LAYER = Layout(
    name="bytetransformer",
    recognise=has_keys("qkv_kernel", "attr_output_kernel"),
    to_ours=lambda state, config: _turned(state, {v: k for k, v in _KERNELS.items()}),
    from_ours=lambda state, config: _turned(state, _KERNELS),
)
"""One post-norm block."""
