"""Key layout of torchvision's vision transformers, and of the official adaptive ones made of them.

The official adaptive layers stand where the FFN and the projections were: ``mlp.w1``,
``self_attention.q_proj.w1`` and so on, see `effformer.models.layouts.acm`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from effformer.blocks import resolve_layers
from effformer.layout import Layout, StateDict, has_keys, renamed

from .acm import join_learners, split_learners
from .forms import SIZES, Form

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
_PROJ = [
    *(
        (f"blocks.{{i}}.attn.part.proj.{kind}", f"{_LAYER}.self_attention.out_proj.{kind}")
        for kind in ("weight", "bias")
    ),
    ("blocks.{i}.attn.part.proj", f"{_LAYER}.self_attention.o_proj"),  # learners
]


def _mlp(first: str, second: str) -> list[tuple[str, str]]:
    pairs = (("fc1", first), ("fc2", second))
    return [(f"blocks.{{i}}.ffn.part.{ours}", f"{_LAYER}.mlp.{theirs}") for ours, theirs in pairs]


_RECOGNISE = has_keys("class_token", "conv_proj.weight", "encoder.pos_embedding")
_READ = renamed(
    "torchvision",
    [*_mlp("0", "3"), *_mlp("linear_1", "linear_2"), *_PROJ, *_BEFORE],
    recognise=_RECOGNISE,
)
_WRITE = renamed("torchvision", [*_mlp("0", "3"), *_PROJ, *_BEFORE], recognise=_RECOGNISE)
_PLACE = re.compile(
    r"(encoder\.layers\.encoder_layer_(\d+)\.(?:mlp|self_attention\.[qkvo]_proj))\."
)


def _to_ours(state: StateDict, config: Any) -> StateDict:
    return _READ.to_ours(_each_place(state, config, split_learners), config)


_FORM = Form(
    # the knobs of learners are those of the official adaptive layers
    free=(
        *SIZES,
        "image_size",
        "channels",
        "patch",
        "num_classes",
        "attn.projections",
        "ffn.learners",
        "ffn.least",
        "ffn.fixed",
        "ffn.gate",
        "ffn.out_bias",
        "ffn.ratio",
        "ffn.hidden",
    ),
    choices={"ffn": ("mlp", "acm")},
    layers=True,
)


def _from_ours(state: StateDict, config: Any) -> StateDict:
    return _each_place(_WRITE.from_ours(state, config), config, join_learners)


def _each_place(
    state: StateDict, config: Any, convert: Callable[[StateDict, int], StateDict]
) -> StateDict:
    """Convert the learners at every place that has some."""
    places: dict[tuple[str, int], StateDict] = {}
    out: StateDict = {}
    layers = resolve_layers(config, config.depth, name="torchvision")
    for key, value in state.items():
        found = _PLACE.match(key)
        if found is None:
            out[key] = value
        else:
            places.setdefault((found[1], int(found[2])), {})[key[found.end() :]] = value
    for (place, i), inner in places.items():
        count = _learners(layers[i], place) if i < len(layers) else None
        if count is not None:  # otherwise reported as unexpected by whoever loads it
            inner = convert(inner, count)
        out |= {f"{place}.{key}": value for key, value in inner.items()}
    return out


def _learners(layer: Any, place: str) -> int | None:
    """Number of learners that a layer has there, None if it is dense."""
    part = layer.ffn if place.endswith(".mlp") else getattr(layer.attn, "projections", None)
    return getattr(part, "learners", None)


TORCHVISION = Layout(
    name="torchvision",
    recognise=_RECOGNISE,
    to_ours=_to_ours,
    from_ours=_from_ours,
    strange=_FORM.strange,
)
