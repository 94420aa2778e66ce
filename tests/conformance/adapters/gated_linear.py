"""The gated linear recurrence: values, final states and gradients of every rule and case."""

from __future__ import annotations

import torch
from harness import Golden
from torch import Tensor

from effformer.attention.gated_scan import gated_scan, retention_decay

RULES = {
    "retention": False, "simple": False, "gla": False, "delta": True, "gated_delta": True,
    "kda": True,
}  # fmt: skip
"""Rule -> delta."""

ON_QUERIES = "key_dim**-0.5 on q, not on k"


def check(golden: Golden) -> None:
    cases = golden.config
    if "rule" in cases:
        cases = {"": cases}
    for name, config in cases.items():
        _check_case(golden, f"{name}." if name else "", config)


def _check_case(golden: Golden, case: str, config: dict[str, object]) -> None:
    where = case.removesuffix(".") or golden.name
    golden.only("rule", *RULES, why=f"{where}: gated_scan has these rules", among=config)
    scale = config.get("scale")
    if not isinstance(scale, float):
        golden.only("scale", ON_QUERIES, why=f"{where}: a number or this", among=config)
        scale = None
    given = {
        key.removeprefix(f"in.{case}"): golden.tensor(key).clone().requires_grad_()
        for key in golden.keys(f"in.{case}")
        if "cotangent" not in key
    }
    heads_first = {n: x if n == "state" else x.transpose(1, 2) for n, x in given.items()}
    q, k, v = (heads_first[n] for n in "qkv")
    g = heads_first.get("g")
    if config["rule"] == "retention":
        g = retention_decay(v.shape[1]).to(v.dtype)
    assert (heads_first.get("state") is not None) == bool(config["initial_state"])
    delta = RULES[str(config["rule"])]
    for chunk in (5, 64):
        out, state = gated_scan(
            q, k, v, g, heads_first.get("beta"), heads_first.get("state"),
            delta=delta, scale=scale, chunk=chunk,
        )  # fmt: skip
        _compare(golden, case, given, out.transpose(1, 2), state)


def _compare(
    golden: Golden, case: str, given: dict[str, Tensor], out: Tensor, state: Tensor
) -> None:
    found = {f"out.{case}o": out, f"out.{case}state": state}
    value = torch.zeros(())
    for x, cotangent in zip(found.values(), ("cotangent", "cotangent_state"), strict=True):
        if f"in.{case}{cotangent}" in golden.tensors:
            value = value + (x * golden.tensor(f"in.{case}{cotangent}")).sum()
    names = [n for n in given if f"grad.{case}{n}" in golden.tensors]
    grads = torch.autograd.grad(value, [given[n] for n in names])
    found |= {f"grad.{case}{n}": x for n, x in zip(names, grads, strict=True)}
    for key, x in found.items():
        _, atol = golden.tolerance
        golden.assert_close(x, key, atol=atol * float(golden.tensor(key).abs().max()))
