"""Key layout of torchvision's vision transformers, and of the official adaptive ones made of them.

The official adaptive layers stand where the FFN and the projections were: ``mlp.w1``,
``self_attention.q_proj.w1`` and so on, see `effformer.models.layouts.acm`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from effformer.blocks import PreNorm
from effformer.checks import FormatError
from effformer.layout import Layout, StateDict, has_keys, renamed

from .acm import join_learners, split_learners

__all__ = ["TORCHVISION"]

_LAYER = "encoder.layers.encoder_layer_{i}"
_BEFORE = [
    ("class_token", "class_token"),
    ("patch_embed.proj", "conv_proj"),
    ("pos_embed", "encoder.pos_embedding"),
    ("blocks.{i}.attn.norm", f"{_LAYER}.ln_1"),
    ("blocks.{i}.ffn.norm", f"{_LAYER}.ln_2"),
    *(
        (f"blocks.{{i}}.attn.part.qkv.{kind}", f"{_LAYER}.self_attention.in_proj_{kind}")
        for kind in ("weight", "bias")
    ),
    *(
        (f"blocks.{{i}}.attn.part.{ours}", f"{_LAYER}.self_attention.{theirs}")
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"))
    ),
    ("blocks.{i}.ffn.part.learners", f"{_LAYER}.mlp"),
    ("norm", "encoder.ln"),
    ("head.linear", "heads.head"),
]
_DENSE = [("blocks.{i}.attn.part.proj", f"{_LAYER}.self_attention.out_proj")]
_ADAPTIVE = [("blocks.{i}.attn.part.proj", f"{_LAYER}.self_attention.o_proj")]


def _mlp(first: str, second: str) -> list[tuple[str, str]]:
    pairs = (("fc1", first), ("fc2", second))
    return [(f"blocks.{{i}}.ffn.part.{ours}", f"{_LAYER}.mlp.{theirs}") for ours, theirs in pairs]


_RECOGNISE = has_keys("class_token", "conv_proj.weight", "encoder.pos_embedding")
_READ = renamed(
    "torchvision",
    [*_mlp("0", "3"), *_mlp("linear_1", "linear_2"), *_DENSE, *_ADAPTIVE, *_BEFORE],
    recognise=_RECOGNISE,
)
_WRITE, _WRITE_ADAPTIVE = (
    renamed("torchvision", [*_mlp("0", "3"), *proj, *_BEFORE], recognise=_RECOGNISE)
    for proj in (_DENSE, _ADAPTIVE)
)
_PLACE = re.compile(r"(encoder\.layers\.encoder_layer_\d+\.(?:mlp|self_attention\.[qkvo]_proj))\.")


def _to_ours(state: StateDict, config: Any) -> StateDict:
    return _READ.to_ours(_each_place(state, config, split_learners), config)


def _from_ours(state: StateDict, config: Any) -> StateDict:
    if not isinstance(config.block, PreNorm.Config) or "class_token" not in state:
        raise FormatError(
            "torchvision's vision transformers have pre-norm blocks and a class token; "
            "layout='effformer' writes any model"
        )
    adaptive = getattr(config.attn, "projections", None) is not None
    out = (_WRITE_ADAPTIVE if adaptive else _WRITE).from_ours(state, config)
    return _each_place(out, config, join_learners)


def _each_place(
    state: StateDict, config: Any, convert: Callable[[StateDict, int], StateDict]
) -> StateDict:
    """Convert the learners at every place that has some."""
    places: dict[str, StateDict] = {}
    out: StateDict = {}
    for key, value in state.items():
        found = _PLACE.match(key)
        if found is None:
            out[key] = value
        else:
            places.setdefault(found[1], {})[key[found.end() :]] = value
    for place, inner in places.items():
        if not inner.keys().isdisjoint(("w1", "fc1.0.weight")):
            part = config.ffn if place.endswith(".mlp") else config.attn.projections
            inner = convert(inner, part.learners)
        out |= {f"{place}.{key}": value for key, value in inner.items()}
    return out


TORCHVISION = Layout(
    name="torchvision", recognise=_RECOGNISE, to_ours=_to_ours, from_ours=_from_ours
)
