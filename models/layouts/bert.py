"""Key layouts of BERT-style encoders: transformers' ``BertModel``, one layer of ByteTransformer."""

from __future__ import annotations

from typing import Any

from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

__all__ = ["BYTETRANSFORMER_LAYER", "HUGGINGFACE"]

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


def _plain(key: str) -> str:
    """A key without the prefix of models around the encoder, in today's spelling."""
    key = key.removeprefix("bert.")
    for old, new in _OLD.items():
        if key.endswith(old):
            key = key.removesuffix(old) + new
    return key


def _to_ours(state: StateDict, config: Any) -> StateDict:
    plain = {_plain(k): v for k, v in state.items()}
    return _NAMES.to_ours({k: v for k, v in plain.items() if k not in _BUFFERS}, config)


HUGGINGFACE = Layout(
    name="huggingface",
    recognise=lambda keys: _NAMES.recognise([_plain(key) for key in keys]),
    to_ours=_to_ours,
    from_ours=_NAMES.from_ours,
)

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
