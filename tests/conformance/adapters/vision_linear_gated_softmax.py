"""Softmax attention with a sigmoid gate of its outputs, which stands in the rows of the queries."""

from __future__ import annotations

import torch
from harness import Golden
from torch import Tensor
from vision_linear import check_gradients, close

from effformer.attention import Attention, Softmax
from effformer.attention.outputs import OutputGate
from effformer.context import Context
from effformer.nn.rope import GridRope
from effformer.site import NormRule, Site


def check(golden: Golden) -> None:
    for case, options in golden.config.items():
        golden.only("rope", "half-split pairs", why="the published layout", among=options)
        site = Site(dim=options["dim"], heads=options["heads"], norm=NormRule(kind="rms", eps=1e-6))
        part = Attention(_config(options), site)
        part.load_state_dict(_translate(golden.weights(f"{case}."), options))
        x = golden.tensor(f"in.{case}.x").clone().requires_grad_()
        y = part(x, Context(rope=_tables(options, x)))
        close(golden, y, golden.tensor(f"out.{case}"), f"out.{case}")
        (y * golden.tensor(f"in.{case}.cotangent")).sum().backward()
        assert x.grad is not None
        close(golden, x.grad, golden.tensor(f"grad.{case}.x"), f"grad.{case}.x")
        check_gradients(golden, case, part, lambda g, o=options: _translate(g, o))


def _config(options: dict[str, object]) -> Attention.Config:
    bias = bool(options["bias"])
    shared = options["kv_heads"] != options["heads"]
    return Attention.Config(
        core=Softmax.Config(causal=options["causal"]),
        gate=OutputGate(per=options["gate"], bias=bias),
        head_dim=options["head_dim"],
        kv_heads=options["kv_heads"] if shared else None,
        qk_norm=options["qk_norm"],
        qkv_bias=bias,
        proj_bias=bias,
    )


def _tables(options: dict[str, object], x: Tensor) -> object:
    rope = GridRope(
        GridRope.Config(temperature=options["theta"], interleaved=False),
        options["head_dim"], heads=options["heads"], depth=1, axes=1,
    )  # fmt: skip
    return rope(rope.positions((x.shape[1],)), like=x)[0]


def _translate(official: dict[str, Tensor], options: dict[str, object]) -> dict[str, Tensor]:
    """The query's rows hold, for each key head, the queries of its group, then their gates."""
    groups, width = options["kv_heads"], options["head_dim"]
    queries = options["heads"] // groups * width
    ours = {f"{n}_norm.weight": official[f"{n}_norm.weight"] for n in "qk"}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" not in official:
            continue
        rows = official[f"q_proj.{kind}"].unflatten(0, (groups, -1))
        q, k, v = rows[:, :queries].flatten(0, 1), *(official[f"{n}_proj.{kind}"] for n in "kv")
        ours[f"qkv.{kind}"] = torch.cat([q, k, v])
        ours[f"output.proj.{kind}"] = rows[:, queries:].flatten(0, 1)
        ours[f"proj.{kind}"] = official[f"o_proj.{kind}"]
    return ours
