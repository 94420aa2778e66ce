from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from effformer.export import ExportReport, Session, export_onnx, graph, quantize_onnx, read_graph
from torch import nn

from effformer.checks import FormatError


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """Two dimensions make the layers Gemm, which the quantizers would pass over."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))
    path = tmp_path_factory.mktemp("dense") / "dense.onnx"
    return export_onnx(model, path, torch.randn(2, 128))


@pytest.mark.parametrize(
    ("options", "error", "ratio"),
    [
        ({"scheme": "dynamic-uint8"}, 0.03, 0.30),
        ({"scheme": "matmul-nbits", "bits": 8}, 0.01, 0.34),
        ({"scheme": "matmul-nbits", "bits": 8, "block": 128, "symmetric": False}, 0.01, 0.31),
        ({"scheme": "matmul-nbits", "bits": 4}, 0.15, 0.22),
        ({"scheme": "matmul-nbits", "bits": 4, "accuracy_level": 4}, 0.15, 0.22),
    ],
)
def test_every_layer_is_quantized(
    options: dict[str, object], error: float, ratio: float, dense: ExportReport, tmp_path: Path
) -> None:
    assert dense.graph.operators["Gemm"] == 2
    handlers = logging.getLogger().handlers[:]
    report = quantize_onnx(dense.path, tmp_path / "q.onnx", **options)  # type: ignore[arg-type]
    assert (report.quantized, report.left) == (2, ())
    assert report.bytes_after == (tmp_path / "q.onnx").stat().st_size
    assert report.ratio < ratio
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    expected = Session(dense.path).run({"x": x, "input": x})["output"]
    actual = Session(tmp_path / "q.onnx").run({"x": x, "input": x})["output"]
    assert abs(actual - expected).max() <= error * abs(expected).max()
    facts = read_graph(tmp_path / "q.onnx")
    assert facts.metadata["effformer.quantization"] == options["scheme"]
    assert facts.metadata["effformer.model"] == "Sequential"
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize("scheme", ["dynamic-uint8", "matmul-nbits"])
def test_large_models_in_place(
    scheme: str, dense: ExportReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "large.onnx"
    monkeypatch.setattr(graph, "SINGLE_FILE_LIMIT", 1000)
    monkeypatch.setattr("effformer.export.quantize.SINGLE_FILE_LIMIT", 1000)
    model = nn.Linear(128, 64)
    export_onnx(model, path, torch.randn(2, 128))
    old = next(tmp_path.glob("*.data"))
    assert quantize_onnx(path, path, scheme).quantized == 1  # type: ignore[arg-type]
    assert not old.exists()
    assert Session(path).outputs == ("output",)


def test_fails_if_nothing_was_quantized(dense: ExportReport, tmp_path: Path) -> None:
    quantize_onnx(dense.path, tmp_path / "q.onnx", "matmul-nbits")
    before = (tmp_path / "q.onnx").read_bytes()
    for scheme in ("matmul-nbits", "dynamic-uint8"):
        with pytest.raises(ValueError, match="nothing was quantized; no product of its"):
            quantize_onnx(tmp_path / "q.onnx", tmp_path / "q.onnx", scheme)  # type: ignore[arg-type]
    assert (tmp_path / "q.onnx").read_bytes() == before


def test_bad_options(dense: ExportReport, tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    with pytest.raises(ValueError, match="scheme: unknown value 'dynamic-int9'; did you mean"):
        quantize_onnx(dense.path, out, "dynamic-int9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bits: unknown value '3'.* 4, 8"):
        quantize_onnx(dense.path, out, "matmul-nbits", bits=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"block: unknown value '48'.* 16, 32, 64, 128, 256"):
        quantize_onnx(dense.path, out, "matmul-nbits", block=48)
    with pytest.raises(FormatError, match="no such file"):
        quantize_onnx(tmp_path / "none.onnx", out)
    assert not out.exists()
