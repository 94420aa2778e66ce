"""Leaky integrate-and-fire neurons: spikes to the bit, potentials, surrogate gradients."""

from __future__ import annotations

from typing import Any

import torch
from harness import Golden

from effformer.nn.lif import LIF

_OPTIONS = {
    "tau": "tau", "v_threshold": "threshold", "v_reset": "reset", "decay_input": "decay_input",
    "detach_reset": "detach_reset", "alpha": "alpha",
}  # fmt: skip


def check(golden: Golden) -> None:
    for number, c in enumerate(golden.config):
        _check_case(golden, c, f"c{number}")


def _check_case(golden: Golden, c: dict[str, Any], case: str) -> None:
    lif = LIF(LIF.Config(**{ours: c[theirs] for theirs, ours in _OPTIONS.items() if theirs in c}))
    x = golden.tensor(f"{case}.in.x")
    assert list(x.shape) == [c["T"], *c["shape"]]
    x = x.flatten(1).T[..., None].clone().requires_grad_()  # one sample per neuron
    spikes, _ = lif(x)
    back = (-1, c["T"])
    assert torch.equal(spikes.reshape(back).T, golden.tensor(f"{case}.out.spikes").flatten(1))
    weight = golden.tensor(f"{case}.in.loss_weight").flatten(1).T[..., None]
    (grad,) = torch.autograd.grad((spikes * weight).sum(), x)
    golden.assert_close(grad.reshape(back).T.reshape(c["T"], *c["shape"]), f"{case}.grad.x")
    v, potentials = None, []
    for token in x.detach().split(1, dim=1):
        _, v = lif(token, v)
        potentials.append(v)
    stacked = torch.stack(potentials).squeeze(-1).reshape(c["T"], *c["shape"])
    golden.assert_close(stacked, f"{case}.out.v_after_reset")
