"""torchao: int8 weights, with dynamic int8 inputs too, and 4-bit groups."""

from __future__ import annotations

from typing import Any

from effformer.compress.quant import QuantLinear, make_scheme, symmetric
from harness import Golden
from torch import nn


def check(golden: Golden) -> None:
    for case, config in enumerate(golden.config):
        for form, spec in (
            ("int8_weight_only", {"name": "torchao-int8"}),
            ("int8_dynamic_int8", {"name": "torchao-int8", "inputs": "dynamic"}),
            ("int4_group", {"name": "torchao-int4", "block": config["group"]}),
        ):
            _check_form(golden, f"c{case}", form, spec)


def _check_form(golden: Golden, case: str, form: str, spec: dict[str, Any]) -> None:
    weight, key = golden.tensor(f"{case}.in.w"), f"{case}.out.{form}"
    scheme: Any = make_scheme(spec)
    codes, scales = symmetric.codes_of(weight, scheme.config.block, scheme.steps, scheme.bits)
    golden.assert_close(codes, f"{key}.qdata", rtol=0, atol=0)
    golden.assert_close(scales, f"{key}.scale", rtol=1e-6)
    assert not golden.tensor(f"{key}.zero_point").any()
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight.data = weight.clone()
    layer = QuantLinear.from_dense(dense, spec)
    golden.assert_close(layer.weight, f"{key}.w_dequant", rtol=1e-6)
    golden.assert_close(layer(golden.tensor(f"{case}.in.x")), f"{key}.y")
