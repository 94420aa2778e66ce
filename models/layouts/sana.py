"""Key layouts of SANA (diffusers): its linear attention and its FFN."""

from __future__ import annotations

from typing import Any

from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

__all__ = ["ATTENTION", "MIX_FFN"]

ATTENTION = renamed(
    "diffusers",
    [("proj", "to_out.0"), ("q_norm", "norm_q"), ("k_norm", "norm_k")],
    rows=[Rows(("qkv.{kind}",), tuple(f"to_{x}.{{kind}}" for x in "qkv"))],
    recognise=has_keys("to_q.weight", "to_out.0.weight"),
)
"""One self-attention."""

_FFN = renamed(
    "diffusers",
    [("fc1", "conv_inverted"), ("conv", "conv_depth"), ("fc2", "conv_point")],
    recognise=has_keys("conv_inverted.weight", "conv_point.weight"),
)
_POINTWISE = ("conv_inverted.weight", "conv_point.weight")


def _to_ours(state: StateDict, config: Any) -> StateDict:
    plain = {k: x.flatten(1) if k in _POINTWISE else x for k, x in state.items()}
    return _FFN.to_ours(plain, config)


def _from_ours(state: StateDict, config: Any) -> StateDict:
    out = _FFN.from_ours(state, config)
    return {k: x[..., None, None] if k in _POINTWISE else x for k, x in out.items()}


MIX_FFN = Layout(name="diffusers", recognise=_FFN.recognise, to_ours=_to_ours, from_ours=_from_ours)
"""One `effformer.ffn.GLUMBConv`; its linear layers are 1x1 convolutions there."""
