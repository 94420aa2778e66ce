from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effformer.export import ExportReport, VerificationError, export_onnx, verify_onnx
from torch import Tensor, nn

from .networks import Mlp


def test_reports_every_output_of_every_case(exported: ExportReport, mlp: Mlp) -> None:
    report = verify_onnx(exported.path, mlp, torch.randn(4, 5, 32), cases=4, threads=1)
    assert report.passed
    assert not report.constant
    assert len(report.cases) == 4
    assert all(len(case.outputs) == 1 for case in report.cases)
    assert report.max_rel == max(c.outputs[0].max_rel for c in report.cases) < 1e-4
    assert report.to_dict()["cases"][0]["shapes"] == {"x": [1, 5, 32]}


def test_finds_other_weights(exported: ExportReport) -> None:
    torch.manual_seed(3)
    with pytest.raises(VerificationError, match="output 'output' differs from torch's") as caught:
        verify_onnx(exported.path, Mlp(), torch.randn(2, 5, 32))
    assert caught.value.report is not None
    assert caught.value.report.max_rel > 1e-2


def test_finds_a_graph_that_is_right_at_the_traced_shape_only(tmp_path: Path) -> None:
    class Baked(nn.Module):
        """Mean over the batch: with the length of the trace it would be a constant."""

        def __init__(self, length: int | None) -> None:
            super().__init__()
            self.length = length

        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0, keepdim=True) / (self.length or x.shape[0]) + x

    x = torch.randn(2, 3)
    export_onnx(Baked(2), tmp_path / "m.onnx", x, verify=False)
    with pytest.raises(VerificationError):
        verify_onnx(tmp_path / "m.onnx", Baked(None), x)


def test_refuses_what_does_not_fit(exported: ExportReport, mlp: Mlp) -> None:
    with pytest.raises(VerificationError, match=r"takes 'x' \('batch', 5, 32\), the example is"):
        verify_onnx(exported.path, mlp, torch.randn(2, 6, 32))

    class Other(nn.Module):
        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return z, z

    with pytest.raises(VerificationError, match="'x' is missing"):
        verify_onnx(exported.path, Other(), torch.randn(2, 5, 32))

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(VerificationError, match="returns 2 tensors, the graph 1"):
        verify_onnx(exported.path, Two(), torch.randn(2, 5, 32))


def test_says_if_the_output_is_constant(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4))
    assert report.parity is not None
    assert report.parity.constant
    assert report.parity.max_rel == 0


def test_values_that_are_not_finite_do_not_agree(tmp_path: Path) -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (-x.abs()).log()

    with pytest.raises(VerificationError, match="is not finite"):
        export_onnx(Log(), tmp_path / "m.onnx", torch.randn(2, 4))


def test_a_model_that_accepts_too_few_sizes(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and x.shape[0] not in (2, 3):
                raise ValueError("2 or 3 rows")
            return x * 2

    with pytest.raises(VerificationError, match=r"runs at only 0 other lengths of batch.*2 or 3"):
        export_onnx(Two(), tmp_path / "m.onnx", torch.randn(2, 4))
