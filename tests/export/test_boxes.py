"""Nodes know their modules, and a graph is told module by module."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from effformer.export import Session, export_onnx, graph_breakdown, quantize_onnx
from torch import nn

from effformer import build_model


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = build_model("vit-nano").eval()
    path = tmp_path_factory.mktemp("boxes") / "vit.onnx"
    export_onnx(model, path, verify=False)
    return model, path


def test_names_of_nodes_begin_with_their_module(graph: tuple[nn.Module, Path]) -> None:
    model, path = graph
    modules = {name for name, _ in model.named_modules()}
    nodes = [n for n in onnx.load(path).graph.node if "/" in n.name]
    assert len({n.name for n in nodes}) == len(nodes) > 40
    assert {n.name.split("/")[0] for n in nodes} <= modules
    assert "_empty" not in "".join(n.name for n in onnx.load(path).graph.node)
    products = {n.name.split("/")[0] for n in nodes if n.op_type in ("MatMul", "Gemm")}
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert products - {"blocks.0.attn.part.core", "blocks.1.attn.part.core"} == linear


def test_bytes_time_and_error_in_a_quantized_graph(
    graph: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, path = graph
    quantize_onnx(path, tmp_path / "small.onnx", "dynamic-int8")
    x = model.example_inputs(2)
    dense, small = (graph_breakdown(p, model, x, runs=2) for p in (path, tmp_path / "small.onnx"))
    stored = {
        p: sum(onnx.numpy_helper.to_array(t).nbytes for t in onnx.load(p).graph.initializer)
        for p in (path, tmp_path / "small.onnx")
    }
    assert dense.names == ("torch", "onnx")
    assert dense.boxes[""][1].bytes == pytest.approx(stored[path], rel=0.01)
    assert small.boxes[""][1].bytes == pytest.approx(stored[tmp_path / "small.onnx"], rel=0.01)
    for where in ("", "blocks.1", "blocks.0.ffn.part.fc2", "head.linear"):
        assert dense.boxes[where][1].error < 1e-5
        assert small.boxes[where][1].error > 1e-3 * (where != "blocks.1")
        assert small.boxes[where][1].bytes < 0.5 * dense.boxes[where][1].bytes
        assert small.boxes[where][1].seconds > 0
        assert small.boxes[where][1].macs == dense.boxes[where][0].macs
    (out,) = Session(tmp_path / "small.onnx").run(x).values()
    with torch.no_grad():
        expected = model(**x)
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    error = float((torch.from_numpy(out) - expected).norm() / expected.norm())
    assert small.boxes[""][1].error == pytest.approx(error, rel=1e-3)
