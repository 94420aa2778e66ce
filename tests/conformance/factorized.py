"""What the adapters of FactFormer and IFactFormer share: one block against its golden set."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from effformer.models.layouts.factformer import Source, block_layout
from harness import Golden
from torch import Tensor

import effformer
from effformer.attention import FactorizedChained, FactorizedParallel
from effformer.attention.factorized import AxisKernel
from effformer.blocks import Branch
from effformer.context import Context, Tap
from effformer.nn.positions import grid_positions
from effformer.site import NormRule, Site


def tolerant(golden: Golden) -> Golden:
    """The norms of these blocks divide by small spreads, and steps repeat: rounding grows 50-fold."""
    return replace(golden, meta={"tolerance": "rtol 1e-4, atol 5e-5"} | golden.meta)


def check_block(golden: Golden, source: Source) -> None:
    """Values inside one block, its output, and its gradients."""
    golden = tolerant(golden)
    c, grid = golden.config, tuple(golden.meta["grid"])
    kind = FactorizedParallel if golden.meta["official_class"].endswith("_m") else FactorizedChained
    config = kind.Config(
        head_dim=c["dim_head"],
        multiplier=c["kernel_multiplier"],
        latent_dim=c["latent_dim"],
        # the official code forgets the factor above a multiplier of 4
        scale=c["scaling_factor"] if c["kernel_multiplier"] <= 4 else None,
        rope=c["use_rope"],
        norm="head" if source == "factformer" else "instance",
    )
    site = Site(
        dim=c["dim"],
        grid=(None,) * len(grid),
        heads=c["heads"],
        out_dim=c["dim_out"],
        norm=NormRule(eps=1e-5),
    )
    branch = Branch(kind(config, site), site)
    layout = block_layout(config, axes=len(grid), heads=c["heads"], source=source)
    effformer.load_weights(branch, golden.weights(), layout)
    _check_round_trip(golden, layout.from_ours(branch.state_dict(), None))
    u, tap = golden.tensor("in.u").requires_grad_(), Tap(keep=("*",))
    x = branch.norm(u.flatten(1, -2))
    y = branch.part(x, Context(grid=grid, positions=grid_positions(coordinates(golden)), tap=tap))
    _check_inside(golden, branch, x, tap, channels_first=source == "ifactformer")
    golden.assert_close(y.view_as(golden.tensor("out.y")), "out.y")
    if "in.cotangent" in golden.tensors:
        loss = (y * golden.tensor("in.cotangent").view_as(y)).mean()
        golden.assert_close(loss, "out.loss")
        loss.backward()
        grads = {k: p.grad for k, p in branch.named_parameters() if p.grad is not None}
        official: dict[str, Tensor] = layout.from_ours(grads, None)
        for key in golden.keys("grad."):
            name = key.removeprefix("grad.")
            golden.assert_close(cast(Tensor, u.grad) if name == "in.u" else official[name], key)


def coordinates(golden: Golden) -> tuple[Tensor, ...]:
    """The coordinates of every axis."""
    return tuple(golden.tensor(f"in.pos_{x}").flatten() for x in "xyz"[: len(golden.meta["grid"])])


def _check_round_trip(golden: Golden, again: dict[str, Tensor]) -> None:
    weights = golden.weights()
    assert set(again) == set(weights)
    for key, value in weights.items():
        torch.testing.assert_close(again[key], value, rtol=1e-6, atol=0)


def _check_inside(
    golden: Golden, branch: Branch, x: Tensor, tap: Tap, *, channels_first: bool
) -> None:
    part = cast(FactorizedChained | FactorizedParallel, branch.part)
    grid = tuple(golden.meta["grid"])
    cells = x.unflatten(1, grid)
    for a, letter in enumerate("xyz"[: len(grid)]):
        others = [1 + b for b in range(len(grid)) if b != a]
        axis = cast(AxisKernel, part.axes[a])
        golden.assert_close(axis.summary(part.pool(cells.mean(others))), f"out.pooled_{letter}")
        golden.assert_close(tap.seen[f".kernel.{a}"], f"out.kernel_{letter}")
    for name, place in (("out.before_norm", ".mixed"), ("out.after_norm", ".normed")):
        value = tap.seen[place].transpose(1, 2).flatten(2)  # (B, N, channels)
        value = value.transpose(1, 2) if channels_first else value
        golden.assert_close(value.reshape(golden.tensor(name).shape), name)
