"""bitsandbytes: dynamic int8, nf4, fp4, double quantization, LLM.int8."""

from __future__ import annotations

from typing import Any

import torch
from effformer.compress.quant import QuantLinear, quantize_rowwise
from effformer.compress.quant import blockwise as bw
from harness import Golden
from torch import Tensor, nn

# The package's 4-bit dequantization kernels hold the tables as rounded constants, and products are
# fused with sums or not: a few units in the last place.
DEQUANT = {"rtol": 3e-7, "atol": 1e-7}


def check(golden: Golden) -> None:
    for key, table in (("dynamic_signed_8bit", bw.DYNAMIC), ("nf4", bw.NF4), ("fp4", bw.FP4)):
        _exact(golden, torch.tensor(table), f"code.{key}")
    for case, config in enumerate(golden.config):
        why = "the package has no other"
        golden.only("nested_blocksize", bw.NESTED_BLOCK, why=why, among=config)
        weight = golden.tensor(f"c{case}.in.w")
        dynamic = {"name": "int8-dynamic", "block": config["blocksize"]}
        layer = _layer(weight, dynamic)
        _exact(golden, layer.codes, f"c{case}.out.int8dyn.q")
        _exact(golden, layer.absmax, f"c{case}.out.int8dyn.absmax")
        golden.assert_close(layer.weight, f"c{case}.out.int8dyn.dequant", **DEQUANT)
        for name in ("nf4", "fp4"):
            _check_4bit(golden, weight, name, config["blocksize"], f"c{case}.out.{name}")
    _check_llm_int8(golden)


def _check_4bit(golden: Golden, weight: Tensor, name: str, block: int, key: str) -> None:
    plain = _layer(weight, {"name": name, "block": block, "double_quant": False})
    _exact(golden, plain.codes, f"{key}.packed")
    _exact(golden, plain.absmax, f"{key}.absmax")
    golden.assert_close(plain.weight, f"{key}.dequant", **DEQUANT)
    nested = _layer(weight, {"name": name, "block": block, "double_quant": True})
    _exact(golden, nested.codes, f"{key}_dq.packed")
    _exact(golden, nested.absmax, f"{key}_dq.absmax_q")
    golden.assert_close(nested.offset, f"{key}_dq.offset", **DEQUANT)
    golden.assert_close(nested.nested_absmax, f"{key}_dq.nested_absmax", **DEQUANT)
    golden.assert_close(nested.weight, f"{key}_dq.dequant", **DEQUANT)


def _check_llm_int8(golden: Golden) -> None:
    activations, weight = golden.tensor("llmint8.in.A"), golden.tensor("llmint8.in.W")
    layer = _layer(weight, "llm-int8").half()
    prefix = "llmint8.thr"
    names = [
        k.removeprefix(prefix).removesuffix(".q") for k in golden.keys(prefix) if k[-2:] == ".q"
    ]
    for threshold in names:
        key = f"{prefix}{threshold}"
        rows = quantize_rowwise(activations, float(threshold))
        _exact(golden, rows.codes, f"{key}.q")
        _exact(golden, rows.absmax, f"{key}.row_absmax")
        if f"{key}.outlier_cols" in golden.tensors:
            _exact(golden, rows.outliers, f"{key}.outlier_cols")
        # the package's layer computes in float16 whatever the threshold: allow one unit in the last
        # place
        golden.assert_close(layer(activations.half()), f"{key}.out", rtol=2**-10, atol=1e-3)


def _layer(weight: Tensor, scheme: str | dict[str, Any]) -> Any:
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight.data = weight.clone()
    return QuantLinear.from_dense(dense, scheme)


def _exact(golden: Golden, actual: Tensor, key: str) -> None:
    golden.assert_close(actual, key, rtol=0, atol=0)
    assert actual.dtype == golden.tensor(key).dtype, key
