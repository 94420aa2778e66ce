from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effformer.export import export_onnx
from torch import Tensor
from torch.nn import functional as F

from effformer.nn.short_conv import ShortConv


def by_hand(conv: ShortConv, x: Tensor, state: Tensor) -> Tensor:
    width, rows = conv.weight.shape[-1], []
    row = torch.cat([state, x], dim=1)
    for t in range(x.shape[1]):
        y = sum(conv.weight[:, 0, i] * row[:, t + i] for i in range(width))
        assert isinstance(y, Tensor)
        y = y if conv.bias is None else y + conv.bias
        rows.append(F.silu(y) if conv.activation == "silu" else y)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "identity"])
@pytest.mark.parametrize("width", [2, 4])
def test_equals_the_sum_by_hand(width: int, activation: str, bias: bool) -> None:
    conv = ShortConv(5, width, bias=bias, activation=activation).double()  # type: ignore[arg-type]
    x, state = torch.randn(2, 7, 5).double(), torch.randn(2, width - 1, 5).double()
    y, last = conv(x, state)
    torch.testing.assert_close(y, by_hand(conv, x, state))
    assert torch.equal(last, torch.cat([state, x], dim=1)[:, -(width - 1) :])
    torch.testing.assert_close(conv(x)[0], by_hand(conv, x, torch.zeros_like(state)))


def test_pieces_equal_the_whole_also_below_its_width() -> None:
    conv, x = ShortConv(3).double(), torch.randn(2, 9, 3).double()
    whole, end = conv(x)
    outputs, state = [], None
    for piece in x.split([1, 2, 6], dim=1):
        y, state = conv(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", ["silu", pytest.param("identity", marks=pytest.mark.slow)])
def test_is_one_operator_of_onnx_runtime(activation: str, bias: bool, tmp_path: Path) -> None:
    conv = ShortConv(6, bias=bias, activation=activation)  # type: ignore[arg-type]
    inputs = {"x": torch.randn(2, 9, 6), "state": torch.randn(2, 3, 6)}
    dynamic = {"x": {0: "batch", 1: "tokens"}, "state": {0: "batch"}}
    report = export_onnx(conv, tmp_path / "m.onnx", inputs, dynamic=dynamic)
    assert report.graph.operators["com.microsoft::CausalConvWithState"] == 1
    assert report.parity is not None
    assert report.parity.max_rel <= 1e-5
    plain = export_onnx(conv, tmp_path / "n.onnx", inputs, dynamic=dynamic, target="onnx")
    assert plain.graph.operators["Conv"] == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"width": 1}, "width 1 is below 2"),
    ({"activation": "relu"}, r"unknown activation 'relu' \(choices: silu, identity\)"),
])  # fmt: skip
def test_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShortConv(4, **change)  # type: ignore[arg-type]
