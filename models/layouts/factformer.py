"""Key layouts of FactFormer and IFactFormer: one factorized block, and IFactFormer as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from effformer.attention.factorized import ROPE_BASE, FactorizedConfig
from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

from .forms import SIZES, Form

__all__ = ["IFACTFORMER", "block_layout"]

Source = Literal["factformer", "ifactformer"]
_OUTPUT: dict[Source, tuple[int, int]] = {"factformer": (1, 3), "ifactformer": (2, 4)}
"""Numbers of the two linear maps behind the kernels: IFactFormer reshapes once more."""
_LETTERS = "xyz"
_TABLE = "low_rank_kernel_{}.pos_emb.inv_freq"


def block_layout(config: FactorizedConfig, *, axes: int, heads: int, source: Source) -> Layout:
    """One block, ours a `effformer.blocks.Branch` around a factorized mixer.

    The published blocks store the frequencies of the rotary embedding, ours follow from the
    formula: they are dropped on the way in and computed on the way out.

    Args:
        config: the mixer's.
        axes: number of grid axes.
        heads: number of heads.
        source: which of the two publications.
    """
    names = renamed(
        source,
        pairs("", "", axes=axes, source=source),
        rows=rows("", "", axes=axes),
        recognise=has_keys("to_v.weight", "low_rank_kernel_x.to_q.weight"),
    )

    def to_ours(state: StateDict, _: Any) -> StateDict:
        return names.to_ours(without_tables(state), None)

    def from_ours(state: StateDict, _: Any) -> StateDict:
        tables = frequencies(state, "part.axes", config, axes=axes, heads=heads)
        return names.from_ours(state, None) | dict(tables)

    return Layout(name=source, recognise=names.recognise, to_ours=to_ours, from_ours=from_ours)


def pairs(ours: str, theirs: str, *, axes: int, source: Source) -> list[tuple[str, str]]:
    """Prefixes of a branch at ``ours`` and of the published block at ``theirs``, dots included."""
    first, second = _OUTPUT[source]
    found = [
        ("norm", "in_norm"), ("part.v", "to_v"), ("part.pool", "to_in"),
        ("part.fc1", f"to_out.{first}"), ("part.fc2", f"to_out.{second}"),
    ]  # fmt: skip
    for a, letter in enumerate(_LETTERS[:axes]):
        # the second and third axis begin with a reshape, which takes a number
        place, axis = f"to_{letter}.{min(a, 1)}", f"part.axes.{a}"
        found += [
            (f"{axis}.proj", f"{place}.to_in"),
            (f"{axis}.norm", f"{place}.out_ffn.norm"),
            (f"{axis}.fc1", f"{place}.out_ffn.fn.net.0"),
            (f"{axis}.fc2", f"{place}.out_ffn.fn.net.3"),
        ]
    return [(ours + mine, theirs + other) for mine, other in found]


def rows(ours: str, theirs: str, *, axes: int) -> list[Rows]:
    """Queries and keys of every axis: one matrix of ours, two of theirs."""
    return [
        Rows(
            (f"{ours}part.axes.{a}.qk.weight",),
            tuple(f"{theirs}low_rank_kernel_{letter}.to_{x}.weight" for x in "qk"),
        )
        for a, letter in enumerate(_LETTERS[:axes])
    ]


def without_tables(state: StateDict) -> StateDict:
    """A published state without the frequencies of rotary embedding."""
    return {k: v for k, v in state.items() if not k.endswith(".pos_emb.inv_freq")}


def frequencies(
    state: StateDict, prefix: str, config: FactorizedConfig, *, axes: int, heads: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The frequencies that a published block stores for every axis, from our state."""
    for a, letter in enumerate(_LETTERS[:axes]):
        weight = state.get(f"{prefix}.{a}.qk.weight")
        if config.rope and weight is not None:
            width = weight.shape[0] // (2 * heads)
            steps = torch.arange(0, width, 2, device=weight.device).float() / width
            yield _TABLE.format(letter), 1 / ROPE_BASE**steps


_LAYER = "encoder.layers.{i}"
_POINTWISE = ("simple_to_out.1.weight", "simple_to_out.3.weight")
_OPERATOR = [
    ("lift", "to_in.0"),
    ("frames", "to_in.2"),
    ("positions.{i}.frequencies", f"{_LAYER}.0.0._B"),
    ("positions.{i}.proj", f"{_LAYER}.0.1"),
    ("head.0", "simple_to_out.1"),
    ("head.2", "simple_to_out.3"),
]
_IS_OPERATOR = has_keys("to_in.2.weight", "encoder.layers.0.0.0._B", "simple_to_out.1.weight")


def _iterated(config: Any) -> bool:
    return bool(config.block.entry.name == "iterate")


def _operator(config: Any) -> Layout:
    """The renaming for one config: an iterated block holds its branch one level deeper."""
    ours = "blocks.{i}.body.attn." if _iterated(config) else "blocks.{i}.attn."
    axes, block = len(config.grid), f"{_LAYER}.1."
    table = [*_OPERATOR, *pairs(ours, block, axes=axes, source="ifactformer")]
    return renamed("official", table, rows=rows(ours, block, axes=axes), recognise=_IS_OPERATOR)


def _to_ours(state: StateDict, config: Any) -> StateDict:
    flat = {k: x.flatten(1) if k in _POINTWISE else x for k, x in without_tables(state).items()}
    return _operator(config).to_ours(flat, config)


def _from_ours(state: StateDict, config: Any) -> StateDict:
    out = _operator(config).from_ours(state, config)
    out = {k: x.unsqueeze(-1) if k in _POINTWISE else x for k, x in out.items()}
    body = ".body" if _iterated(config) else ""
    if not isinstance(config.attn, FactorizedConfig):
        return out
    for i in range(config.depth):
        prefix = f"blocks.{i}{body}.attn.part.axes"
        tables = frequencies(state, prefix, config.attn, axes=len(config.grid), heads=config.heads)
        out |= {f"{_LAYER.format(i=i)}.1.{key}": table for key, table in tables}
    return out


_FORM = Form(
    free=(
        *SIZES, "channels", "out_channels", "window", "grid", "attn.head_dim", "attn.multiplier", "attn.latent_dim",
        "attn.gain", "block.times",
    ),
    choices={
        "block": ("prenorm", "iterate"),
        "attn": ("factorized-parallel", "factorized-chained"),
    },
)  # fmt: skip
IFACTFORMER = Layout(
    name="official",
    recognise=_IS_OPERATOR,
    to_ours=_to_ours,
    from_ours=_from_ours,
    strange=_FORM.strange,
)
"""The whole operator; its head of linear maps is one of 1x1 convolutions there."""
