"""What the adapters of cores with rotary tables share: one core, its gradients and its stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from harness import Golden
from torch import Tensor

from effformer.context import Context, Rope
from effformer.site import Site


def site(c: dict[str, Any]) -> Site:
    """The place of a core with the heads of a case."""
    return Site(dim=c["H"] * c["K"], heads=c["H"])


def context(golden: Golden, case: str, c: dict[str, Any], rows: slice = slice(None)) -> Context:
    """Tables of some tokens, and the mask if the case has one."""
    cos, sin = (golden.tensor(f"in.{case}.{name}")[rows] for name in ("cos", "sin"))
    rope = Rope(cos, sin, interleaved=c.get("interleaved", True))
    if "lengths" not in c:
        return Context(rope=rope)
    return Context(rope=rope, mask=torch.arange(c["L"]) < torch.tensor(c["lengths"])[:, None])


def check_core(golden: Golden, case: str, c: dict[str, Any], core: Any) -> None:
    """Values and gradients of a core that rotates by itself, or that is given rotated vectors."""
    inputs = [golden.tensor(f"in.{case}.{x}").clone().requires_grad_() for x in "qkv"]
    ctx, (q, k, v) = context(golden, case, c), inputs
    if core.rotates == "qk":
        assert ctx.rope is not None
        q, k, ctx = ctx.rope.query(q), ctx.rope.key(k), replace(ctx, rope=None)
    out = core(q, k, v, ctx)
    golden.assert_close(out, f"out.{case}")
    grads = torch.autograd.grad(out, inputs, golden.tensor(f"in.{case}.cotangent"))
    for name, grad in zip("qkv", grads, strict=True):
        golden.assert_close(grad, f"grad.{case}.{name}")


def check_stream(golden: Golden, case: str, c: dict[str, Any], core: Any, state: Any) -> None:
    """The causal form piece by piece, and the sums that it ends with."""
    q, k, v = (golden.tensor(f"in.{case}.{x}") for x in "qkv")
    outputs: list[Tensor] = []
    for start, stop in ((0, 1), (1, 6), (6, q.shape[2])):
        some, ctx = slice(start, stop), context(golden, case, c, slice(start, stop))
        out, state = core.step(q[:, :, some], k[:, :, some], v[:, :, some], state, ctx)
        outputs.append(out)
    golden.assert_close(torch.cat(outputs, dim=2), f"out.{case}")
    for key in golden.keys(f"out.{case}."):
        golden.assert_close(getattr(state, key.rpartition(".")[2]), key)
