"""The same bytes as the packages whose formats these are."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from effformer.compress.quant import QuantLinear, make_scheme
from effformer.compress.quant import blockwise as bw
from torch import Tensor, nn


def heavy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tail = torch.rand(shape, generator=generator).clamp(min=1e-3).sqrt()
    return torch.randn(shape, generator=generator) / tail


@pytest.fixture(scope="module")
def functional() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("shape", [(1, 5), (10, 37), (64, 96), (257, 130), (1024, 1000)])
@pytest.mark.parametrize("block", [64, 256, 4096])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_4bit(
    functional: Any, shape: tuple[int, int], block: int, name: str, double: bool
) -> None:
    weight = heavy(shape)
    packed, state = functional.quantize_4bit(
        weight, blocksize=block, quant_type=name, compress_statistics=double
    )
    ours = make_scheme({"name": name, "block": block, "double_quant": double})
    tensors = ours.encode(weight)
    assert torch.equal(tensors["codes"], packed)
    assert torch.equal(tensors["absmax"], state.absmax)
    if double:
        assert torch.equal(tensors["nested_absmax"], state.state2.absmax)
        assert torch.equal(tensors["offset"][0], state.offset)


@pytest.mark.parametrize("n", [1, 63, 64, 1000, 300_001])
@pytest.mark.parametrize("block", [64, 96, 4096])
def test_bitsandbytes_dynamic(functional: Any, n: int, block: int) -> None:
    weight = heavy((n,))
    weight[: n // 3] = 0
    theirs, state = functional.quantize_blockwise(weight, blocksize=block)
    codes, absmax = bw.quantize_flat_8bit(weight, block)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, state.absmax)
    decoded = bw.dequantize_flat(torch.tensor(bw.DYNAMIC)[codes.int()], absmax, block)
    # the package makes its table by torch.linspace, whose last bit depends on the instruction set
    assert_close(decoded, functional.dequantize_blockwise(theirs, state), rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize(("k", "n"), [(64, 24), (70, 10), (33, 7), (768, 40), (1000, 64), (16, 3)])
@pytest.mark.parametrize("block", [16, 32, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_onnxruntime(k: int, n: int, block: int, bits: int, symmetric: bool) -> None:
    pytest.importorskip("onnxruntime")
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    weight = heavy((n, k))
    weight[0] = 0
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    columns = np.ascontiguousarray(weight.t().numpy())
    packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(columns)
    rows = bw.quantize_rows(weight, bits=bits, block=block, symmetric=symmetric)
    theirs = torch.from_numpy(packed).flatten(1)
    if bits == 4:
        theirs = bw.unpack_nibbles(theirs, k, high_first=False)
    assert torch.equal(rows.codes, theirs[:, :k])
    assert torch.equal(rows.scales, torch.from_numpy(scales))
    if rows.zero_points is not None:
        ours = bw.pack_zero_points(rows.zero_points, bits=bits)
        assert torch.equal(ours, torch.from_numpy(zeros).view_as(ours))


@pytest.mark.parametrize("k", [8, 96, 100, 600])
@pytest.mark.parametrize("block", [16, 128, None])
@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_nbits_computes_what_the_layer_computes(
    k: int, block: int | None, name: str, symmetric: bool
) -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    dense = nn.Linear(k, 24, bias=False)
    dense.weight.data = heavy((24, k))
    layer = QuantLinear.from_dense(dense, {"name": name, "block": block, "symmetric": symmetric})
    op = layer.to_matmul_nbits()
    assert op is not None
    constants = {"w": op.packed, "s": op.scales, "z": op.zero_points}
    present = {key: value for key, value in constants.items() if value is not None}
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *present], ["y"], domain="com.microsoft",
        K=op.K, N=op.N, bits=op.bits, block_size=op.block_size,
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [5, k])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [5, 24])],
        [onnx.numpy_helper.from_array(v.numpy(), key) for key, v in present.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = heavy((5, k), seed=1)
    (y,) = session.run(None, {"x": x.numpy()})
    assert_close(torch.from_numpy(y), layer(x).detach(), rtol=1e-4, atol=1e-5)
