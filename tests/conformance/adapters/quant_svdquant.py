"""SVDQuant: smoothing, branch, codes of weights and inputs, errors of every iteration."""

from __future__ import annotations

from typing import Any

import torch
from effformer.compress.quant import QuantLinear, svdquant, symmetric
from effformer.compress.quant.calibrate import Seen
from harness import Golden
from torch import Tensor, nn


def check(golden: Golden) -> None:
    for case, config in golden.config.items():
        _check_case(golden, case, config)


def _check_case(golden: Golden, case: str, config: dict[str, Any]) -> None:
    x, weight = golden.tensor(f"in.x.{case}"), golden.tensor(f"w.weight.{case}")
    bias, group, (n, k) = golden.tensor(f"w.bias.{case}"), config["group"], weight.shape
    inner = symmetric.W4A4(symmetric.W4A4.Config(block=group))
    seen = Seen(k, ["peak", "sample"])
    seen.add(x)
    assert seen.peak is not None
    s = svdquant.smoothing(seen.peak, weight, config["alpha"], config["beta"])
    golden.assert_close(s, f"out.smooth.{case}")
    exact = (x @ weight.t()).double()

    def output(down: Tensor, up: Tensor, rest: dict[str, Tensor]) -> Tensor:
        return inner.linear(x / s, rest, n, k) + (x / s) @ down.t() @ up.t()

    def error(down: Tensor, up: Tensor, rest: dict[str, Tensor]) -> float:
        return float((output(down, up, rest).double() - exact).square().sum())

    made = svdquant.decompose(
        weight * s, config["rank"], inner, error, iterations=config["max_iterations"]
    )
    golden.assert_close(torch.tensor(made.errors).double(), f"out.errors.{case}", rtol=1e-3)
    assert made.best == int(golden.tensor(f"out.best_iter.{case}"))
    golden.assert_close(made.up @ made.down, f"out.lowrank.{case}")
    golden.assert_close(made.rest["scales"], f"out.scale.w.{case}")
    golden.assert_close(inner.decode(made.rest, n, k), f"out.dequant.w.{case}")
    codes, _ = symmetric.codes_of(weight * s - made.up @ made.down, group, 7.0, 4)
    golden.assert_close(codes, f"out.codes.w.{case}", rtol=0, atol=0)
    codes, scales = symmetric.codes_of(x / s, group, 7.0, 4)
    golden.assert_close(codes, f"out.codes.x.{case}", rtol=0, atol=0)
    golden.assert_close(scales, f"out.scale.x.{case}")
    golden.assert_close(output(made.down, made.up, made.rest) + bias, f"out.y.{case}")
    _check_layer(golden, case, config, seen)


def _check_layer(golden: Golden, case: str, config: dict[str, Any], seen: Seen) -> None:
    """The layer, whose branch has 16 bit, is as near to the dense one as the official code."""
    weight, bias = golden.tensor(f"w.weight.{case}"), golden.tensor(f"w.bias.{case}")
    dense = nn.Linear(weight.shape[1], weight.shape[0])
    dense.weight.data, dense.bias.data = weight.clone(), bias.clone()
    layer = QuantLinear.from_dense(
        dense,
        svdquant.SVDQuant.Config(
            scheme=symmetric.W4A4.Config(block=config["group"]), rank=config["rank"],
            alpha=config["alpha"], beta=config["beta"], iterations=config["max_iterations"],
        ),
        seen=seen,
    )  # fmt: skip
    x = golden.tensor(f"in.x.{case}")
    error = float((layer(x) - dense(x)).detach().square().sum())
    best = float(golden.tensor(f"out.errors.{case}").min())
    assert error <= 1.05 * best
    assert error < 0.5 * float(golden.tensor(f"out.rtn_error.{case}")[0])
