"""Linformer layers: full and shorter inputs, shared projections, one key head, a context."""

from __future__ import annotations

from typing import Any

import torch
from harness import Golden

from effformer.attention import Attention, Linformer
from effformer.config import resolve
from effformer.context import Context
from effformer.site import Site


def check(golden: Golden) -> None:
    cases = [k.split(".")[1] for k in golden.keys("in.") if k.endswith(".x")]
    for case in (case for case in cases if case != "cross"):
        part = _layer(golden, case)
        x = golden.tensor(f"in.{case}.x").requires_grad_()
        out = part(x)
        golden.assert_close(out, f"out.{case}")
        if f"in.{case}.cotangent" in golden.tensors:
            cotangent = golden.tensor(f"in.{case}.cotangent")
            grads = torch.autograd.grad(out, (x, part.core.key), cotangent)
            golden.assert_close(grads[0], f"grad.{case}.x")
            golden.assert_close(grads[1], f"grad.{case}.proj_k")
    memory = golden.tensor("in.cross.context")
    part = _layer(golden, "cross", memory_dim=memory.shape[2])
    golden.assert_close(part(golden.tensor("in.cross.x"), Context(memory=memory)), "out.cross")


def _layer(golden: Golden, case: str, **site: Any) -> Attention:
    c, w = golden.config, golden.weights(f"{case}.")
    shared = "proj_v" not in w  # this package then takes the keys for values, too
    core = Linformer.Config(
        tokens=c["seq_len"], projected=c["k"], share="key-value" if shared else "none"
    )
    width = c["dim"] // c["heads"]
    kv_heads = w["to_k.weight"].shape[0] // width
    config = resolve("attention", core).replace(qkv_bias=False, kv_heads=kv_heads)
    part = Attention(config, Site(dim=c["dim"], heads=c["heads"], **site)).eval()
    keys, values = w["to_k.weight"], w["to_k.weight" if shared else "to_v.weight"]
    if part.cross:
        state = {"q.weight": w["to_q.weight"], "kv.weight": torch.cat([keys, values])}
    else:
        state = {"qkv.weight": torch.cat([w["to_q.weight"], keys, values])}
    state |= {"core.key": w["proj_k"]} | ({} if shared else {"core.value": w["proj_v"]})
    state |= {f"proj.{kind}": w[f"to_out.{kind}"] for kind in ("weight", "bias")}
    part.load_state_dict(state)
    return part
