"""ONNX Runtime: MatMulNBits weights and DynamicQuantizeLinear."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from effformer.compress.quant import QuantLinear, dynamic_quantize_linear
from effformer.compress.quant import blockwise as bw
from effformer.export import Session, export_onnx, quantize_onnx
from harness import Golden
from torch import Tensor, nn


def check(golden: Golden) -> None:
    for case, config in enumerate(golden.config):
        _check_weight(golden, config, f"c{case}")
    if "dql.in.x" in golden.tensors:
        result = dynamic_quantize_linear(golden.tensor("dql.in.x"))
        golden.assert_close(result.codes, "dql.out.q", rtol=0, atol=0)
        golden.assert_close(result.scale.view(1), "dql.out.scale", rtol=0, atol=0)
        golden.assert_close(result.zero_point.view(1), "dql.out.zero_point", rtol=0, atol=0)


def _check_weight(golden: Golden, config: dict[str, Any], case: str) -> None:
    bits, block, symmetric = config["bits"], config["block_size"], config["symmetric"]
    dense = nn.Linear(config["K"], config["N"], bias=False)
    dense.weight.data = golden.tensor(f"{case}.in.B").t().contiguous()
    layer = QuantLinear.from_dense(
        dense, {"name": f"int{bits}", "block": block, "symmetric": symmetric}
    )
    rows = bw.quantize_rows(dense.weight, bits=bits, block=block, symmetric=symmetric)
    packed = bw.pack_rows(rows.codes, bits=bits, block=block)
    expected = golden.tensor(f"{case}.out.B_packed")
    assert packed.shape == expected.shape
    torch.testing.assert_close(
        _codes(packed, bits, config["K"]), _codes(expected, bits, config["K"]), rtol=0, atol=0
    )
    shape = golden.tensor(f"{case}.out.scales").shape
    golden.assert_close(layer.scales.view(shape), f"{case}.out.scales", rtol=0, atol=0)
    if not symmetric:
        key = f"{case}.out.zero_points_packed"
        shape = golden.tensor(key).shape
        golden.assert_close(layer.zero_points.view(shape), key, rtol=0, atol=0)
    golden.assert_close(layer.weight.t(), f"{case}.out.B_dequant", rtol=3e-7, atol=1e-7)
    golden.assert_close(layer(golden.tensor(f"{case}.in.A")), f"{case}.out.Y")
    _check_graph(dense, golden, config, case)
    exported = layer.to_matmul_nbits()
    if exported is not None and exported.block_size == block:
        assert torch.equal(exported.packed, packed)
        assert torch.equal(exported.scales, layer.scales)


def _codes(packed: Tensor, bits: int, k: int) -> Tensor:
    """The K codes of each row. What fills the byte after an odd K is left over in the package's
    buffer.
    """
    rows = packed.flatten(1)
    return rows[:, :k] if bits == 8 else bw.unpack_nibbles(rows, k, high_first=False)


def _check_graph(dense: nn.Module, golden: Golden, config: dict[str, Any], case: str) -> None:
    """A graph that is quantized as a whole gives what the operator gave."""
    given = golden.tensor(f"{case}.in.A")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        export_onnx(dense, path, given, verify=False)
        quantize_onnx(
            path, path, "matmul-nbits", bits=config["bits"], block=config["block_size"],
            symmetric=config["symmetric"],
        )  # fmt: skip
        session = Session(path)
        (made,) = session.run({session.inputs[0]: given}).values()
    golden.assert_close(torch.from_numpy(made), f"{case}.out.Y")
