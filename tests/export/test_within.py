"""Accuracy control of graphs: products go back until the metric keeps its limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effformer.export import Session, export_onnx, quantize_onnx, quantize_onnx_within, read_graph
from effformer.export.products import products
from torch import nn

from effformer.checks import FormatError

X = torch.linspace(-1, 1, 6 * 64).reshape(6, 64)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)
    )
    with torch.no_grad():  # one product that bears 4 bits badly
        model[2].weight[:, ::9] *= 40
    path = tmp_path_factory.mktemp("graph") / "graph.onnx"
    export_onnx(model.eval(), path, X, verify=False)
    return path


def distance(session: Session) -> torch.Tensor:
    wanted = _wanted[0]
    (made,) = session.run({session.inputs[0]: X}).values()
    return (torch.from_numpy(made) - wanted).norm() / wanted.norm()


_wanted: list[torch.Tensor] = []


@pytest.fixture(autouse=True)
def _reference(graph: Path) -> None:
    session = Session(graph)
    _wanted[:] = [torch.from_numpy(next(iter(session.run({session.inputs[0]: X}).values())))]


def test_products_go_back_until_the_metric_keeps_its_limit(graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    loose = quantize_onnx_within(graph, out, distance, "int4", best="low", max_drop=9.0)
    assert loose.back == ()
    assert loose.drop > 0
    limit = 0.97 * loose.drop
    found = quantize_onnx_within(graph, out, distance, "int4", best="low", max_drop=limit)
    assert 0 < len(found.back) < 3
    assert found.drop <= limit
    assert float(distance(Session(out))) == pytest.approx(found.metric)
    assert found.quantized.left == tuple(one.name for one in found.back)
    assert read_graph(out).operators["com.microsoft::MatMulNBits"] == 3 - len(found.back)
    exact = quantize_onnx_within(graph, out, distance, best="low", max_drop=0.0)
    assert len(exact.back) == 3


def test_named_products_stay_and_unknown_ones_are_refused(graph: Path, tmp_path: Path) -> None:
    names = products(graph)
    assert len(names) == len(set(names)) == 3
    for options in ({}, {"scheme": "matmul-nbits"}):
        report = quantize_onnx(graph, tmp_path / "a.onnx", keep=names[:1], **options)
        assert report.left == tuple(names[:1])
        assert report.quantized == 2
    with pytest.raises(ValueError, match=f"'nope' is no product of .*{names[0]}"):
        quantize_onnx(graph, tmp_path / "b.onnx", keep=["nope"])
    assert not (tmp_path / "b.onnx").exists()


def test_wrong_input_is_refused_and_nothing_is_written(graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    with pytest.raises(ValueError, match="unknown scheme 'int5'"):
        quantize_onnx_within(graph, out, distance, "int5")
    with pytest.raises(ValueError, match="keep is no option of a scheme"):
        quantize_onnx_within(graph, out, distance, {"keep": []})
    with pytest.raises(TypeError, match="metric: expected a number"):
        quantize_onnx_within(graph, out, lambda session: "good")
    with pytest.raises(ValueError, match="gives nan"):
        quantize_onnx_within(graph, out, lambda session: float("nan"))
    with pytest.raises(FormatError, match="no such file"):
        quantize_onnx_within(tmp_path / "none.onnx", out, distance)
    assert not list(tmp_path.iterdir())
