"""Key layouts of TripoSG: its mixture of experts."""

from __future__ import annotations

from typing import Any

import torch

from effformer.layout import Layout, StateDict, has_keys

__all__ = ["MOE"]

_KINDS = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}


def _to_ours(state: StateDict, config: Any) -> StateDict:
    out: StateDict = {}
    for key, value in state.items():
        if key in _KINDS:
            out |= {f"experts.{e}.{_KINDS[key]}": x for e, x in enumerate(value)}
        elif key.removeprefix("shared_") in _KINDS:
            out[f"shared.{_KINDS[key.removeprefix('shared_')]}"] = value
        else:
            out["router.weight" if key == "gate" else key] = value
    return out


def _from_ours(state: StateDict, config: Any) -> StateDict:
    out: StateDict = {}
    for theirs, ours in _KINDS.items():
        keys = [f"experts.{e}.{ours}" for e in range(config.experts)]
        if all(key in state for key in keys):
            out[theirs] = torch.stack([state[key] for key in keys])
        if f"shared.{ours}" in state:
            out[f"shared_{theirs}"] = state[f"shared.{ours}"]
    if "router.weight" in state:
        out["gate"] = state["router.weight"]
    return out


MOE = Layout(
    name="stacked", recognise=has_keys("gate", "w1", "w2"), to_ours=_to_ours, from_ours=_from_ours
)
"""One `effformer.ffn.MoE`; no official code is published, and this is how its experts are stored
together: ``gate`` (E, D), ``w1`` (E, h, D), ``w2`` (E, D, h), ``shared_w1``, ...
"""
