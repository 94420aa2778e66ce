"""HQQ: codes, scales, zero points and decoded weights of the package."""

from __future__ import annotations

from typing import Any

from effformer.compress.quant import QuantLinear, hqq
from harness import Golden
from torch import nn


def check(golden: Golden) -> None:
    for case, config in golden.config.items():
        _check_case(golden, case, config)


def _check_case(golden: Golden, case: str, config: dict[str, Any]) -> None:
    weight, size, axis = golden.tensor(f"in.weight.{case}"), config["group_size"], config["axis"]
    knobs = hqq.HQQ.Config(
        bits=config["nbits"],
        block=size,
        steps=20 if config["optimize"] else 0,
        round_zero=config["round_zero"],
    )
    golden.only("axis", 0, 1, why="groups lie along rows or across them", among=config)
    # groups along axis 0 are the columns of reshape(size, -1)
    groups = weight.reshape(-1, size) if axis == 1 else weight.reshape(size, -1).t()
    codes, scale, zero = hqq.solve(groups.contiguous(), knobs)
    decoded = (codes - zero) * scale
    if axis == 0:
        codes, scale, zero, decoded = (x.t() for x in (codes, scale, zero, decoded))
    golden.assert_close(codes, f"out.codes.{case}", rtol=0, atol=0)
    for ours, key in ((scale, "scale"), (zero, "zero"), (decoded.reshape(weight.shape), "dequant")):
        golden.assert_close(ours, f"out.{key}.{case}", rtol=1e-5, atol=1e-6)
    if axis == 1 and weight.shape[1] % size == 0:
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        dense.weight.data = weight.clone()
        layer = QuantLinear.from_dense(dense, knobs)
        ours, theirs = (
            (weight - w).abs().pow(knobs.power).sum()
            for w in (layer.weight, golden.tensor(f"out.dequant.{case}"))
        )
        assert ours <= theirs * (1 + 1e-5), "the layer keeps the better of solved and nearest"
