"""Key layout of FlowSep, bare ("official") and as in the released checkpoint ("single-file"): that of latent
diffusion's U-Net, with two transformers at every place with attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from effformer.checks import FormatError
from effformer.layout import Layout, StateDict, has_keys

from .forms import Form

__all__ = ["LAYOUTS"]

_PREFIX = "model.diffusion_model."
_KINDS = ("weight", "bias")
_RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "skip": "skip_connection",
}  # fmt: skip
_QKV = ("to_q", "to_k", "to_v")

Names = tuple[str, tuple[str, ...]]
"""A module of ours, and theirs whose rows it stacks."""


def _names(config: Any) -> Iterator[Names]:
    """Every module with weights."""
    yield from (
        ("time_embed.fc1", ("time_embed.0",)), ("time_embed.fc2", ("time_embed.2",)),
        ("stem", ("input_blocks.0.0",)), ("head_norm", ("out.0",)), ("head", ("out.2",)),
    )  # fmt: skip
    block = 0
    places = [(f"down.{i}", f"input_blocks.{i + 1}", step) for i, step in enumerate(config.down)]
    places += [("middle", "middle_block", config.middle)]
    places += [(f"up.{i}", f"output_blocks.{i}", step) for i, step in enumerate(config.up)]
    for ours, theirs, step in places:
        if step.convolves:
            yield from _residual(f"{ours}.residual", f"{theirs}.0")
        for i in range(2 * step.attends):
            yield from _cells(f"{ours}.cells.{i}", f"{theirs}.{i + 1}", block + 2 * i, last=i > 0)
        block += 3 * step.attends
        index = step.convolves + 2 * step.attends
        yield f"{ours}.resize", (f"{theirs}.{index}.{'op' if step.resize < 1 else 'conv'}",)
    yield from _residual("middle_residual", "middle_block.3")


def _residual(ours: str, theirs: str) -> Iterator[Names]:
    yield from ((f"{ours}.{a}", (f"{theirs}.{b}",)) for a, b in _RESIDUAL.items())


def _cells(ours: str, theirs: str, block: int, *, last: bool) -> Iterator[Names]:
    """One of their transformers: two blocks of ours, or the one that attends to the text."""
    inner = f"{theirs}.transformer_blocks.0"
    first, second = (
        f"blocks.{block}.attn",
        f"blocks.{block}.cross" if last else f"blocks.{block + 1}.attn",
    )
    for own, there in (("norm", "norm"), ("enter", "proj_in"), ("leave", "proj_out")):
        yield f"{ours}.{own}", (f"{theirs}.{there}",)
    for own, n in ((first, 1), (second, 2)):
        attn = f"{inner}.attn{n}"
        yield f"{own}.norm", (f"{inner}.norm{n}",)
        yield f"{own}.part.proj", (f"{attn}.to_out.0",)
        if own.endswith("cross"):
            yield f"{own}.part.q", (f"{attn}.to_q",)
            yield f"{own}.part.kv", tuple(f"{attn}.{name}" for name in _QKV[1:])
        else:
            yield f"{own}.part.qkv", tuple(f"{attn}.{name}" for name in _QKV)
    ffn = f"blocks.{block if last else block + 1}.ffn"
    for own, there in (("norm", "norm3"), ("part.fc1", "ff.net.0.proj"), ("part.fc2", "ff.net.2")):
        yield f"{ffn}.{own}", (f"{inner}.{there}",)


def _to_ours(state: StateDict, config: Any) -> StateDict:
    rest = dict(state)
    out: StateDict = {}
    for ours, theirs in _names(config):
        for kind in _KINDS:
            keys = [f"{name}.{kind}" for name in theirs]
            if all(key in rest for key in keys) and len({rest[k].shape[1:] for k in keys}) == 1:
                out[f"{ours}.{kind}"] = _turned(ours, torch.cat([rest.pop(key) for key in keys]))
    return out | rest  # reported as unexpected by whoever loads it


def _from_ours(state: StateDict, config: Any) -> StateDict:
    rest = dict(state)
    out: StateDict = {}
    for ours, theirs in _names(config):
        for kind in _KINDS:
            if (value := rest.pop(f"{ours}.{kind}", None)) is not None:
                pieces = _turned(ours, value, back=True).chunk(len(theirs))
                out |= {f"{name}.{kind}": x for name, x in zip(theirs, pieces, strict=True)}
    for key in rest:
        raise FormatError(f"layout 'official' has no name for {key}")
    return out


def _turned(ours: str, value: Tensor, *, back: bool = False) -> Tensor:
    """Gated units hold the gate first here and last there; 1x1 convolutions are linear layers here."""
    if ours.endswith("ffn.part.fc1"):
        return torch.cat(value.chunk(2)[::-1])
    if ours.endswith((".enter", ".leave")) and value.dim() > 1:
        return value[..., None, None] if back else value.flatten(1)
    return value


def _bare(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without what stands before the names of the network; averages, which stand beside ``model``, come
    without that.
    """
    begins = (_PREFIX, _PREFIX.partition(".")[2])
    return {
        key.removeprefix(begins[0]).removeprefix(begins[1]): value for key, value in state.items()
    }


_FORM = Form(
    free=(
        "dim", "multipliers", "residuals", "attention", "head_dim", "input_size", "channels", "mixture", "text_dim",
        "text_length", "ffn.ratio", "ffn.hidden",
    ),
)  # fmt: skip
_MARKS = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.2.proj_in.weight")
OFFICIAL = Layout(
    name="official",
    recognise=has_keys(*_MARKS),
    to_ours=_to_ours,
    from_ours=_from_ours,
    strange=_FORM.strange,
)
SINGLE = replace(
    OFFICIAL,
    name="single-file",
    recognise=lambda keys: has_keys(*_MARKS)(_bare(dict.fromkeys(keys))),
    to_ours=lambda state, config: _to_ours(_bare(state), config),
    from_ours=lambda state, config: {
        f"{_PREFIX}{key}": value for key, value in _from_ours(state, config).items()
    },
    around=(
        "first_stage_model.", "cond_stage_model", "clap.", "model_ema.", "betas", "alphas_", "sqrt_", "log_one_",
        "posterior_", "lvlb_", "logvar", "scale_factor",
    ),
)  # fmt: skip
LAYOUTS = (OFFICIAL, SINGLE)
