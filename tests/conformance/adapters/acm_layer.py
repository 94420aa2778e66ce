"""One adaptive computation module: every number of learners, its gate, distillation, labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from effformer.compress.dynamic.adaptive_losses import distillation_loss, gate_labels, gate_loss
from effformer.models.layouts.acm import ACM_LAYER
from harness import Golden

import effformer
from effformer.context import Context, Ledger
from effformer.ffn import ACM
from effformer.site import Site


def check(golden: Golden) -> None:
    for i, config in enumerate(golden.config):
        start = f"c{i}."
        mine = {k.removeprefix(start): v for k, v in golden.tensors.items() if k.startswith(start)}
        _check_case(replace(golden, name=f"{golden.name} {start}", tensors=mine), config)


def _build(golden: Golden, c: dict[str, Any]) -> ACM:
    config = ACM.Config.from_dict(
        {
            "hidden": c["block_dim"] * c["num_blocks"],
            "act": golden.activation(c["activation"]),
            "bias": c["bias"] in (True, "hidden_only"),
            "out_bias": c["bias"] in (True, "out_only"),
            "learners": c["num_blocks"],
            "least": c["min_choice"],
            "gate": {"depth": c["gate_depth"], "hidden": c["gate_hidden"], "tau": c["gate_tau"]},
        }
    )
    part = ACM(config, Site(dim=c["hidden_dim"]))
    effformer.load_weights(part, golden.weights(), ACM_LAYER)
    return part.eval()


def _check_case(golden: Golden, c: dict[str, Any]) -> None:
    part, x = _build(golden, c), golden.tensor("in.x")
    ledger = Ledger()
    with torch.no_grad():
        golden.assert_close(part.learners.every(x), "out.all")
        golden.assert_close(part(x, Context(ledger=ledger)), "out.gated")
        golden.assert_close(part.learners.gate.logits(x), "out.gate_logits")
    choice = ledger.choices[""].gate
    golden.assert_close(choice, "out.gate_onehot")
    golden.assert_close(choice.argmax(dim=-1), "out.k")
    _check_gumbel(golden, part)
    for name, detach in (("detach", True), ("no_detach", False)):
        part.zero_grad()
        loss = distillation_loss(part.learners, x, golden.tensor("in.teacher"), detach=detach)
        golden.assert_close(loss.reshape(1), "out.distill_loss")
        loss.backward()
        _check_grads(golden, part, f"grad.{name}.")
    _check_labels(golden, part)


def _check_gumbel(golden: Golden, part: ACM) -> None:
    gate, x = part.learners.gate, golden.tensor("in.x")
    noise = golden.tensor("in.gumbel_noise")
    golden.assert_close(gate.soft(gate.logits(x), noise), "out.gumbel_soft")
    hard = gate(x, noise)
    golden.assert_close(hard, "out.gumbel_hard")
    part.zero_grad()
    (hard * golden.tensor("in.gumbel_loss_weight")).sum().backward()
    _check_grads(golden, part, "grad.gumbel.")


def _check_grads(golden: Golden, part: ACM, prefix: str) -> None:
    grads = {k: p.grad for k, p in part.named_parameters() if p.grad is not None}
    official = ACM_LAYER.from_ours(grads, part.config)
    keys = golden.keys(prefix)
    assert keys
    for key in keys:
        golden.assert_close(official[key.removeprefix(prefix)], key)


def _check_labels(golden: Golden, part: ACM) -> None:
    teacher = golden.tensor("in.teacher_for_labels")
    with torch.no_grad():
        outputs = part.learners.every(golden.tensor("in.x"))
    errors = (outputs - teacher.unsqueeze(-2)).norm(dim=-1)
    golden.assert_close(errors, "out.errors")
    for key in golden.keys("out.labels_tau"):
        labels = gate_labels(errors, float(key.removeprefix("out.labels_tau")))
        golden.assert_close(labels, key)
        # the official loss takes the logarithm of probabilities plus 1e-20
        loss = gate_loss((golden.tensor("in.gate_probs_for_nll") + 1e-20).log(), labels)
        golden.assert_close(loss.reshape(1), "out.gate_nll")
