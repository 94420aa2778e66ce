"""Key layout of adaptive computation modules: one layer with its gate.

The official layer stores the matrices of all learners side by side, input first: ``w1`` (D, K h)
and ``w2`` (K h, D), and the output biases of 0..K learners as one flat ``b2``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effformer.layout import Layout, StateDict, has_keys

__all__ = ["ACM_LAYER", "join_learners", "split_learners"]

_GATE = ("gate.net.", "gating_network.net.")


def split_learners(state: StateDict, count: int) -> StateDict:
    """Official keys of one layer -> those of `effformer.nn.learners.Learners` with ``count``
    learners.
    """
    state = dict(state)
    out: StateDict = {}
    if "b2" in state:
        biases = state.pop("b2").chunk(count + 1)
        out["zero"] = biases[0]
        out |= {f"fc2.{i}.bias": b for i, b in enumerate(biases[1:])}
    if "b1" in state:
        out |= {f"fc1.{i}.bias": b for i, b in enumerate(state.pop("b1").chunk(count))}
    if "w1" in state:
        columns = state.pop("w1").chunk(count, dim=1)
        out |= {f"fc1.{i}.weight": w.T.contiguous() for i, w in enumerate(columns)}
    if "w2" in state:
        rows = state.pop("w2").chunk(count)
        out |= {f"fc2.{i}.weight": w.T.contiguous() for i, w in enumerate(rows)}
    return out | {k.replace(_GATE[1], _GATE[0]): v for k, v in state.items()}


def join_learners(state: StateDict, count: int) -> StateDict:
    """The inverse of `split_learners`."""
    state = dict(state)

    def pieces(ours: str) -> list[Tensor]:
        return [state.pop(ours.format(i)) for i in range(count) if ours.format(i) in state]

    out = {}
    if first := pieces("fc1.{}.weight"):
        out["w1"] = torch.cat(first).T.contiguous()
    if second := pieces("fc2.{}.weight"):
        out["w2"] = torch.cat([w.T for w in second])
    if hidden := pieces("fc1.{}.bias"):
        out["b1"] = torch.cat(hidden)
    if "zero" in state:
        out["b2"] = torch.cat([state.pop("zero"), *pieces("fc2.{}.bias")])
    return out | {k.replace(_GATE[0], _GATE[1]): v for k, v in state.items()}


def _to_ours(state: StateDict, config: Any) -> StateDict:
    return {f"learners.{k}": v for k, v in split_learners(state, config.learners).items()}


def _from_ours(state: StateDict, config: Any) -> StateDict:
    plain = {k.removeprefix("learners."): v for k, v in state.items()}
    return join_learners(plain, config.learners)


ACM_LAYER = Layout(
    name="official", recognise=has_keys("w1", "w2"), to_ours=_to_ours, from_ours=_from_ours
)
"""One `effformer.ffn.ACM`."""
