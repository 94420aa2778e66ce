"""Power-of-two scales per tile, products of such tensors, and tables of functions of 8-bit codes.

The set is our own evaluation of the definition: the paper has no public code.
"""

from __future__ import annotations

from typing import Any

from effformer.compress.quant import QuantLinear, bct
from harness import Golden
from torch import nn


def check(golden: Golden) -> None:
    for case, config in enumerate(golden.config):
        _check_case(golden, f"c{case}", config)
    for kind, table in (("gelu", bct.gelu_table), ("exp_nonpositive", bct.exp_table)):
        for key in golden.keys(f"lut.{kind}.shift"):
            shift = int(key.removeprefix(f"lut.{kind}.shift"))
            golden.assert_close(table(shift), key, rtol=1e-6, atol=1e-7)


def _check_case(golden: Golden, case: str, config: dict[str, Any]) -> None:
    tile = (config["block"][0], config["block"][1])
    decoded = {}
    for side in "AB":
        x, bits = golden.tensor(f"{case}.in.{side}"), config[f"bits_{side}"]
        codes, shift = bct.shifted(x, tile, bits)
        golden.assert_close(codes, f"{case}.out.q{side}", rtol=0, atol=0)
        golden.assert_close(shift, f"{case}.out.shift{side}", rtol=0, atol=0)
        decoded[side] = bct.unshifted(codes, shift, tile)
        golden.assert_close(decoded[side], f"{case}.out.{side}_dequant", rtol=0, atol=0)
    golden.assert_close(decoded["A"] @ decoded["B"], f"{case}.out.Y")
    weight = golden.tensor(f"{case}.in.B")  # (K, C) as x @ B: the layer holds its transpose
    dense = nn.Linear(*weight.shape, bias=False)
    dense.weight.data = weight.t().contiguous()
    knobs = bct.BCT.Config(bits=config["bits_B"], rows=tile[1], columns=tile[0])
    layer = QuantLinear.from_dense(dense, knobs)
    golden.assert_close(layer.weight.t(), f"{case}.out.B_dequant", rtol=0, atol=0)
    golden.assert_close(layer(decoded["A"]), f"{case}.out.Y")
    size = 8 * sum(t.numel() * t.element_size() for t in layer.tensors().values())
    exact = (weight.shape[0] % tile[0], weight.shape[1] % tile[1]) == (0, 0)
    if exact:
        assert size / weight.numel() == config["bits_per_weight"]
