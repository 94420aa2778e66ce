from __future__ import annotations

import pytest
import torch
from effformer.compress.quant import dynamic_quantize_linear, quantize_rowwise
from hypothesis import given, settings
from hypothesis import strategies as st


def test_rows_without_outliers() -> None:
    a = torch.randn(5, 40)
    rows = quantize_rowwise(a)
    assert rows.outliers.numel() == 0
    decoded = rows.codes.float() * rows.absmax[:, None] / 127
    assert ((decoded - a).abs() <= rows.absmax[:, None] / 254 * 1.001).all()


def test_outlier_columns_are_left_out() -> None:
    a = torch.randn(4, 16).clamp(-3, 3)
    a[1, 5], a[3, 9] = 20.0, -6.0
    rows = quantize_rowwise(a, threshold=6.0)
    assert rows.outliers.tolist() == [5, 9]
    assert not rows.codes[:, [5, 9]].any()
    assert (rows.absmax <= 3).all()
    # codes of the other columns and the outlier columns in floating point give the product back
    weight = torch.randn(7, 16)
    codes = rows.codes.float() * rows.absmax[:, None] / 127
    product = codes @ weight.t() + a[:, rows.outliers] @ weight[:, rows.outliers].t()
    exact = a @ weight.t()
    assert float((product - exact).norm() / exact.norm()) < 0.01


def test_zero_rows_and_bad_arguments() -> None:
    assert not quantize_rowwise(torch.zeros(2, 3)).codes.any()
    with pytest.raises(ValueError, match=r"expected \(M, K\)"):
        quantize_rowwise(torch.zeros(3))
    with pytest.raises(ValueError, match="threshold"):
        quantize_rowwise(torch.zeros(2, 3), -1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30))
def test_dynamic_quantize_linear_bounds(values: list[float]) -> None:
    x = torch.tensor(values)
    q = dynamic_quantize_linear(x)
    decoded = (q.codes.float() - q.zero_point.float()) * q.scale
    # half a step of rounding and half a step of the zero point
    assert ((decoded - x).abs() <= q.scale * 1.001).all()
    zero = (torch.zeros(()).div(q.scale).round() + q.zero_point.float()) - q.zero_point.float()
    assert zero == 0


def test_dynamic_quantize_linear_equals_onnxruntime() -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [tensor("x", onnx.TensorProto.FLOAT, [None])],
        [
            tensor("q", onnx.TensorProto.UINT8, [None]),
            tensor("s", onnx.TensorProto.FLOAT, []),
            tensor("z", onnx.TensorProto.UINT8, []),
        ],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    cases = [
        torch.randn(n) * s + m for n, s, m in ((1, 1, 0), (1000, 3, 5), (777, 1, -4), (64, 9, 0))
    ]
    for x in [*cases, torch.zeros(4)]:
        q, s, z = session.run(None, {"x": x.numpy()})
        ours = dynamic_quantize_linear(x)
        assert torch.equal(ours.codes, torch.from_numpy(q))
        assert float(ours.scale) == float(s)
        assert int(ours.zero_point) == int(z)
