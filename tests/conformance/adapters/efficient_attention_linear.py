"""Linear Transformer: parallel, causal and token by token."""

from __future__ import annotations

import torch
from harness import Golden

from effformer.attention.linear import Linear, LinearState
from effformer.context import Context
from effformer.site import Site


def check(golden: Golden) -> None:
    c = golden.config
    site = Site(dim=c["heads"] * c["e"], heads=c["heads"])
    lengths = golden.tensors.get("in.full.key_lengths")
    mask = None if lengths is None else torch.arange(c["S"]) < lengths[:, None]
    memory = torch.empty(c["batch"], c["S"], 1)
    full, causal = (Linear(Linear.Config(causal=x, eps=c["eps"]), site) for x in (False, True))
    _check_case(golden, "full", full, Context(mask=mask, memory=memory))
    q, k, v = _check_case(golden, "causal", causal, Context())
    sums = k.new_zeros(c["batch"], c["heads"], c["e"])
    state, pieces = LinearState(sums, k.new_zeros(*sums.shape, c["m"])), []
    for i in range(c["L"]):
        out, state = causal.step(*(x[:, :, i : i + 1] for x in (q, k, v)), state)
        pieces.append(out)
    golden.assert_close(torch.cat(pieces, dim=2).transpose(1, 2), "out.recurrent")
    golden.assert_close(state.kv, "out.recurrent.final_S")
    golden.assert_close(state.k, "out.recurrent.final_Z")


def _check_case(golden: Golden, case: str, core: Linear, ctx: Context) -> list[torch.Tensor]:
    inputs = [golden.tensor(f"in.{case}.{x}").requires_grad_() for x in "qkv"]
    heads = [x.transpose(1, 2) for x in inputs]
    out = core(*heads, ctx).transpose(1, 2)
    golden.assert_close(out, f"out.{case}")
    grads = torch.autograd.grad(out, inputs, golden.tensor(f"in.{case}.cotangent"))
    for name, grad in zip("qkv", grads, strict=True):
        golden.assert_close(grad, f"grad.{case}.{name}")
    return [x.detach() for x in heads]
