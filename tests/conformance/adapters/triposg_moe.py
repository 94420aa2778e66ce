"""TripoSG's mixture of experts: routing, both weightings, balance, gradients."""

from __future__ import annotations

import re
from typing import Any

import torch
from effformer.models.layouts.triposg import MOE
from harness import Golden

import effformer
from effformer.context import Context, Ledger
from effformer.ffn import MoE
from effformer.ffn.moe import balance_loss
from effformer.site import Site


def check(golden: Golden) -> None:
    part, x = _build(golden), golden.tensor("in.x").clone().requires_grad_()
    probabilities, weights, chosen = part.route(x)
    golden.assert_close(chosen.flatten(0, -2), "out.topk_idx")
    golden.assert_close(weights.flatten(0, -2), "out.topk_prob")
    golden.assert_close(balance_loss(probabilities, chosen).reshape(1), "out.aux_balance")
    ledger = Ledger()
    y = part(x, Context(ledger=ledger))
    golden.assert_close(y, "out.y")
    (y.square().mean() + ledger.total_loss()).backward()
    assert x.grad is not None
    golden.assert_close(x.grad, "grad.x")
    official = MOE.from_ours({"router.weight": part.router.weight.grad}, part.config)
    golden.assert_close(official["gate"], "grad.gate")
    with torch.no_grad():
        golden.assert_close(_build(golden, renormalise=True)(x), "out.y_renormalised")


def _balance(golden: Golden) -> float:
    """The weight of the auxiliary loss in the gradients: "... of mean(out.y**2)+0.01*aux"."""
    found = re.search(r"([\d.]+(?:e-?\d+)?) ?\* ?aux", golden.meta["note"])
    assert found is not None
    return float(found[1])


def _build(golden: Golden, **more: Any) -> MoE:
    c = golden.config
    options = {
        "hidden": c["hidden"],
        "experts": c["experts"],
        "top_k": c["top_k"],
        "shared": c["shared"],
        "balance": _balance(golden),
        **more,
    }
    part = MoE(MoE.Config.from_dict(options), Site(dim=c["d"]))
    weights = {k.removeprefix("in."): v for k, v in golden.tensors.items() if k.startswith("in.")}
    del weights["x"]
    effformer.load_weights(part, weights, MOE)
    return part.eval()
