"""Graphs keep the epsilons of their models, however small."""

from __future__ import annotations

from pathlib import Path

import torch
from effformer.export import export_onnx
from torch import Tensor, nn


class Small(nn.Module):
    """Each line is large only because of its epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        near = x * 1e-7
        y = near * torch.rsqrt(near.square().mean() + 1e-8)
        y = y + 1e-12 / (1e-9 + near.square()) - (x.relu() + 1e-9).log()
        return y + (near.square() - 1e-8).reciprocal() * 1e-8 + (near.mean() + 1e-8)


def test_small_terms_are_kept(tmp_path: Path) -> None:
    x = torch.randn(2, 5)
    report = export_onnx(Small(), tmp_path / "m.onnx", x, dynamic={"x": {0: "batch"}})
    assert report.parity is not None
    assert report.parity.passed
