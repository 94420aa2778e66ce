"""Auxiliary losses of adaptive computation modules, with gradients."""

from __future__ import annotations

from functools import partial

from effformer.compress.dynamic.adaptive_losses import (
    budget_loss,
    diversity_loss,
    entropy_loss,
    gate_labels,
)
from harness import Golden
from torch import Tensor
from torch.nn import functional as F

from effformer.ledger import Choice


def check(golden: Golden) -> None:
    c = golden.config
    losses = {
        "budget_l1": partial(budget_loss, target=c["target_budget"]),
        "budget_l2": partial(budget_loss, target=c["target_budget"], power=2),
        "entropy": entropy_loss,
        "diversity": diversity_loss,
    }
    costs = c["per_token_learner_cost"]
    for name, loss in losses.items():
        gates = {m: golden.tensor(f"in.gate.{m}").clone().requires_grad_() for m in c["modules"]}
        value = loss({m: Choice(g, costs[m]) for m, g in gates.items()})
        golden.assert_close(value.reshape(1), f"out.{name}")
        value.backward()
        for m, gate in gates.items():
            assert gate.grad is not None
            golden.assert_close(gate.grad, f"grad.{name}.{m}")
        if f"out.hard.{name}" in golden.tensors:
            hard = {m: Choice(_one_hot(g), costs[m]) for m, g in gates.items()}
            golden.assert_close(loss(hard).reshape(1), f"out.hard.{name}")
    for key in golden.keys("out.labels_tau"):
        tau = float(key.removeprefix("out.labels_tau"))
        golden.assert_close(gate_labels(golden.tensor("in.label_errors"), tau), key)


def _one_hot(gate: Tensor) -> Tensor:
    return F.one_hot(gate.argmax(dim=-1), gate.shape[-1]).to(gate.dtype)
