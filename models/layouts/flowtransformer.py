"""Keras variable paths of FlowTransformer's blocks.

Dense kernels are (in, out), attention kernels (D, H, K) and (H, K, D), kernels of the convolutional
encoder (1, in, out). Keras numbers layers of the same kind in the order of their making, so layers
that have no name of their own are told apart by rank, not by number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from effformer.layout import Layout, StateDict

__all__ = ["ATTENTION", "decoder_layout", "encoder_layout"]

_KINDS = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
_HEADS = ("query", "key", "value")
_ENCODER = {
    "attention_output": "attn.part.proj",
    "attention_layer_norm": "attn.norm",
    "feed_forward_0": "ffn.part.fc1",
    "feed_forward_1": "ffn.part.fc2",
    "feed_forward_layer_norm": "ffn.norm",
}
_DECODER = {
    "attention_output": "attn.part.proj",
    "layer_normalization": "attn.norm",
    "layer_normalization_1": "ffn.norm",
    "dense": "ffn.part.fc1",
    "dense_1": "ffn.part.fc2",
}
_FOLDERS = {"dense": "sequential/", "dense_1": "sequential/"}


def encoder_layout(heads: int) -> Layout:
    """Layout of `FlowTransformerEncoder` alone; names may have any prefix.

    Args:
        heads: number of heads, for the way back to kernels with an axis of heads.
    """

    def to_ours(state: StateDict, config: Any) -> StateDict:
        made = _layers(state, _ENCODER)
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in _HEADS]
            if all(name in made for name in names):
                made[f"attn.part.qkv.{kind}"] = torch.cat([made.pop(name) for name in names])
        return made

    def from_ours(state: StateDict, config: Any) -> StateDict:
        made = {}
        for key, value in state.items():
            layer, _, kind = key.rpartition(".")
            if layer == "attn.part.qkv":
                for name, third in zip(_HEADS, value.chunk(3), strict=True):
                    made[_attention("multi_head_attn", name, kind)] = _to_heads(third, heads)
            else:
                made |= _to_keras(key, value, _ENCODER, heads, "multi_head_attn")
        return {f"transformer_encoder/{key}": value for key, value in made.items()}

    return Layout(name="keras", recognise=_recognise, to_ours=to_ours, from_ours=from_ours)


def decoder_layout(heads: int) -> Layout:
    """Layout of `FlowTransformerDecoder` alone; names may have any prefix.

    Args:
        heads: number of heads, for the way back to kernels with an axis of heads.
    """

    def to_ours(state: StateDict, config: Any) -> StateDict:
        made = _layers(_ranked(state, ("layer_normalization", "dense")), _DECODER)
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in _HEADS]
            if all(name in made for name in names):
                query, key, value = (made.pop(name) for name in names)
                made[f"attn.part.q.{kind}"] = query
                made[f"attn.part.kv.{kind}"] = torch.cat([key, value])
        return made

    def from_ours(state: StateDict, config: Any) -> StateDict:
        made = {}
        for key, value in state.items():
            layer, _, kind = key.rpartition(".")
            if layer in ("attn.part.q", "attn.part.kv"):
                names = _HEADS[:1] if layer.endswith(".q") else _HEADS[1:]
                for name, piece in zip(names, value.chunk(len(names)), strict=True):
                    made[_attention("multi_head_attention", name, kind)] = _to_heads(piece, heads)
            else:
                made |= _to_keras(key, value, _DECODER, heads, "multi_head_attention")
        return {f"transformer_decoder_block/{key}": value for key, value in made.items()}

    return Layout(name="keras", recognise=_recognise, to_ours=to_ours, from_ours=from_ours)


def _plain_to_ours(state: StateDict, config: Any) -> StateDict:
    """Four dense layers in the order of their numbers: query, key, value, output."""
    names = {"dense": "0", "dense_1": "1", "dense_2": "2", "dense_3": "proj"}
    made = _layers(_ranked(state, ("dense",)), names)
    for kind in ("weight", "bias"):
        keys = [f"{i}.{kind}" for i in range(3)]
        if all(key in made for key in keys):
            made[f"qkv.{kind}"] = torch.cat([made.pop(key) for key in keys])
    return made


def _plain_from_ours(state: StateDict, config: Any) -> StateDict:
    made = {}
    for kind, theirs in (("weight", "kernel"), ("bias", "bias")):
        pieces = [*state[f"qkv.{kind}"].chunk(3), state[f"proj.{kind}"]]
        for i, piece in enumerate(pieces):
            number = f"_{i}" if i else ""
            made[f"gpt3_attention/dense{number}/{theirs}"] = piece.T if kind == "weight" else piece
    return made


def _recognise(keys: Iterable[str]) -> bool:
    return any(key.endswith("query/kernel") for key in keys)


ATTENTION = Layout(
    name="keras",
    recognise=lambda keys: all("/dense" in key for key in keys),
    to_ours=_plain_to_ours,
    from_ours=_plain_from_ours,
)
"""The plain scaled dot-product attention, an `Attention` of ours."""


def _layers(state: StateDict, names: dict[str, str]) -> StateDict:
    """Our names and shapes; projections to heads keep their own names, what is foreign its key."""
    made: StateDict = {}
    for key, value in state.items():
        *_, layer, kind = ["", *key.split("/")]
        if kind not in _KINDS:
            made[key] = value  # reported as unexpected by whoever loads it
        elif layer in _HEADS:
            flat = value.flatten(1).T if kind == "kernel" else value.flatten()
            made[f"{layer}.{_KINDS[kind]}"] = flat
        else:
            fitting = [n for n in names if layer == n or layer.endswith(f"_{n}")]
            ours = names[max(fitting, key=len)] if fitting else None
            flat = value.flatten(0, -2).T if kind == "kernel" else value
            made[key if ours is None else f"{ours}.{_KINDS[kind]}"] = flat
    return made


def _ranked(state: StateDict, stems: tuple[str, ...]) -> StateDict:
    """Layers ``stem``, ``stem_3``, ... renumbered by rank: ``stem``, ``stem_1``, ..."""
    places: dict[str, set[int]] = {stem: set() for stem in stems}
    forms = {stem: re.compile(rf"(.*/)?{stem}(?:_(\d+))?/([^/]+)") for stem in stems}
    found: list[tuple[str, str, int, str]] = []
    made: StateDict = {}
    for key in state:
        for stem, form in forms.items():
            if (match := form.fullmatch(key)) is not None:
                places[stem].add(int(match[2] or 0))
                found.append((key, stem, int(match[2] or 0), match[3]))
                break
        else:
            made[key] = state[key]
    for key, stem, number, kind in found:
        rank = sorted(places[stem]).index(number)
        made[f"{stem}_{rank}/{kind}" if rank else f"{stem}/{kind}"] = state[key]
    return made


def _attention(module: str, name: str, kind: str) -> str:
    return f"{module}/{name}/{'kernel' if kind == 'weight' else 'bias'}"


def _to_heads(rows: Tensor, heads: int) -> Tensor:
    """(H K, D) to (D, H, K), or (H K,) to (H, K)."""
    return rows.T.unflatten(1, (heads, -1)) if rows.dim() == 2 else rows.unflatten(0, (heads, -1))


def _to_keras(
    key: str, value: Tensor, names: dict[str, str], heads: int, attention: str
) -> StateDict:
    """One parameter of a layer that keeps its matrix."""
    layer, _, kind = key.rpartition(".")
    theirs = next((n for n, ours in names.items() if ours == layer), None)
    if theirs is None:
        return {key: value}
    if theirs == "attention_output":
        turned = value.T.unflatten(0, (heads, -1)) if kind == "weight" else value
        return {_attention(attention, theirs, kind): turned}
    if layer.endswith("norm"):
        return {f"{theirs}/{'gamma' if kind == 'weight' else 'beta'}": value}
    turned = value.T if kind == "weight" else value
    path = f"{_FOLDERS.get(theirs, '')}{theirs}"
    return {f"{path}/{'kernel' if kind == 'weight' else 'bias'}": turned}
