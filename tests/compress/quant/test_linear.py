from __future__ import annotations

import copy
import warnings

import pytest
import torch
from effformer.compress.quant import QuantEmbedding, QuantLinear
from safetensors.torch import load, save
from torch import nn

SCHEMES = [
    "int8",
    {"name": "int8", "block": 32, "symmetric": False},
    "int4",
    {"name": "int4", "block": 24, "symmetric": False},
    "nf4",
    {"name": "fp4", "double_quant": False},
    "int8-dynamic",
    "llm-int8",
]
each = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


@each
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [64, 37])
def test_forward_is_linear_with_the_decoded_weight(
    scheme: str | dict[str, object], bias: bool, k: int
) -> None:
    dense = nn.Linear(k, 12, bias=bias)
    layer = QuantLinear.from_dense(dense, scheme)
    x = torch.randn(2, 3, k)
    expected = nn.functional.linear(x, layer.weight, dense.bias)
    assert torch.equal(layer(x), expected)
    assert (layer.in_features, layer.out_features, layer.macs(10)) == (k, 12, 10 * 12 * k)
    assert torch.equal(layer.to_dense()(x), expected)


@each
def test_gradient_flows_to_the_input_and_the_bias(scheme: str | dict[str, object]) -> None:
    layer = QuantLinear.from_dense(nn.Linear(64, 12), scheme)
    x = torch.randn(4, 64, requires_grad=True)
    layer(x).square().sum().backward()
    expected = 2 * layer(x).detach() @ layer.weight
    torch.testing.assert_close(x.grad, expected)
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@each
def test_state_dict_is_plain_tensors(scheme: str | dict[str, object]) -> None:
    dense = nn.Linear(64, 12)
    layer = QuantLinear.from_dense(dense, scheme)
    again = QuantLinear.like(nn.Linear(64, 12), scheme)
    again.load_state_dict(load(save(layer.state_dict())))
    x = torch.randn(3, 64)
    assert torch.equal(again(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@each
def test_casting_changes_the_result_type_but_not_the_scales(
    scheme: str | dict[str, object],
) -> None:
    layer = QuantLinear.from_dense(nn.Linear(64, 12), scheme)
    before = {name: t.clone() for name, t in layer.tensors().items()}
    weight = layer.weight
    layer.bfloat16()
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(torch.equal(t, before[name]) for name, t in layer.tensors().items())
    assert torch.equal(layer.float().weight, weight)
    half = QuantLinear.from_dense(nn.Linear(64, 12).bfloat16(), scheme)
    assert half.weight.dtype == torch.bfloat16


@each
def test_export_and_compile(scheme: str | dict[str, object]) -> None:
    layer = QuantLinear.from_dense(nn.Linear(72, 12), scheme).eval()
    x = torch.randn(3, 72)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    for rows in (1, 5):
        sample = torch.randn(rows, 72)
        torch.testing.assert_close(program.module()(sample), layer(sample))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@each
def test_embedding_decodes_the_rows_asked_for(scheme: str | dict[str, object]) -> None:
    dense = nn.Embedding(11, 40)
    table = QuantEmbedding.from_dense(dense, scheme)
    for ids in (torch.tensor([[0, 10], [3, 3]]), torch.tensor(7)):
        assert torch.equal(table(ids), table.weight[ids])
    assert torch.equal(table.to_dense()(torch.arange(11)), table.weight)
    with pytest.raises((IndexError, RuntimeError)):
        table(torch.tensor([11]))
    with pytest.raises((IndexError, RuntimeError)):
        table(torch.tensor([-1]))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(table, (torch.tensor([1, 2]),), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(torch.arange(5)), table(torch.arange(5)))


@pytest.mark.parametrize(
    "scheme",
    [SCHEMES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SCHEMES[1:4])],
    ids=str,
)
def test_tables_of_row_formats_export_to_onnx(scheme: str | dict[str, object]) -> None:
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    table = QuantEmbedding.from_dense(nn.Embedding(11, 40), scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            table,
            (torch.tensor([1, 2]),),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString())
    ids = torch.tensor([10, 0, 3])
    (rows,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(rows), table(ids))


def test_not_a_number_is_refused_by_name() -> None:
    dense = nn.Linear(8, 4)
    dense.weight.data[1, 2] = float("nan")
    dense.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1\.weight: 1 NaN and 1 infinite"):
        QuantLinear.from_dense(dense, "nf4", where="blocks.0.fc1.weight")
    dense.weight.data.fill_(1e38)
    dense.weight.data[0, 0] = -3e38
    with pytest.raises(ValueError, match="fc1: scales of scheme 'int8'"):
        QuantLinear.from_dense(dense, {"name": "int8", "symmetric": False}, where="fc1")
    dense.weight.data.fill_(1e5)
    with pytest.raises(ValueError, match="absmax of scheme 'llm-int8'"):
        QuantLinear.from_dense(dense, "llm-int8")


def test_repr_shows_the_scheme() -> None:
    layer = QuantLinear.from_dense(nn.Linear(8, 4), {"name": "nf4", "block": 32})
    assert "8 -> 4, nf4(block=32, double_quant=True)" in repr(layer)
