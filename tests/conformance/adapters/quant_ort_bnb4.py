"""ONNX Runtime's MatMulBnb4: bytes of nf4 and fp4 weights, and what the operator makes of ours."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress.quant import QuantLinear
from effformer.compress.quant import blockwise as bw
from effformer.compress.quant.schemes import MatMulBnb4
from effformer.export import export_onnx
from harness import Golden
from torch import Tensor, nn


def check(golden: Golden) -> None:
    layers = {case: _check_case(golden, case, config) for case, config in golden.config.items()}
    made = _graph(list(layers.values()), [golden.tensor(f"in.A.{case}") for case in layers])
    for case, y in zip(layers, made, strict=True):
        golden.assert_close(y, f"out.Y.{case}", rtol=1e-5)


def _check_case(golden: Golden, case: str, config: dict[str, Any]) -> QuantLinear:
    golden.only("quant_type", 0, 1, why="0 is fp4, 1 nf4", among=config)
    weight, name = golden.tensor(f"w.weight.{case}"), ("fp4", "nf4")[config["quant_type"]]
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight.data = weight.clone()
    spec = {"name": name, "block": config["block_size"], "double_quant": False}
    layer = QuantLinear.from_dense(dense, spec).eval()
    kernel = layer.kernel()
    assert isinstance(kernel, MatMulBnb4)
    golden.assert_close(kernel.absmax, f"out.absmax.{case}", rtol=0, atol=0)
    packed = golden.tensor(f"out.packed.{case}")
    if name == "nf4":
        assert torch.equal(kernel.packed, packed)
    table = {"nf4": bw.NF4, "fp4": bw.FP4}[name]
    # fp4 has two zeros, and the package takes the other one
    ours, theirs = (
        bw.lookup_nibbles(x, table, weight.numel(), high_first=True)
        for x in (kernel.packed, packed)
    )
    assert torch.equal(ours, theirs)
    golden.assert_close(layer(golden.tensor(f"in.A.{case}")), f"out.Y.{case}", rtol=1e-5)
    return layer


class _Together(nn.Module):
    """Several layers, each with a piece of one input."""

    def __init__(self, layers: list[QuantLinear], inputs: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shapes = [x.shape for x in inputs]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        pieces = x.split([shape.numel() for shape in self.shapes])
        parts = zip(self.layers, pieces, self.shapes, strict=True)
        return tuple(layer(piece.view(shape)) for layer, piece, shape in parts)


def _graph(layers: list[QuantLinear], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of an exported graph with one MatMulBnb4 for each layer."""
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    x = torch.cat([x.flatten() for x in inputs])
    with tempfile.TemporaryDirectory() as folder:
        report = export_onnx(
            _Together(layers, inputs), Path(folder) / "layers.onnx", x, dynamic=None,
            target="onnx-cpu-small", verify=False,
        )  # fmt: skip
        assert report.graph.operators.get("com.microsoft::MatMulBnb4") == len(layers)
        session = ort.InferenceSession(str(report.path))
        made = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(y) for y in made]
