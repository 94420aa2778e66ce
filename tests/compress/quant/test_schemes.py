from __future__ import annotations

import json

import pytest
import torch
from effformer.compress.quant import QuantLinear, make_scheme
from torch import nn

from effformer import registry

NAMES = ["int8", "int4", "nf4", "fp4", "int8-dynamic", "llm-int8"]
OPTIONS = [
    {"name": "int8", "block": 32, "symmetric": False},
    {"name": "int8", "block": 7},
    {"name": "int4", "block": 5, "symmetric": False},
    {"name": "int4", "block": None, "symmetric": False},
    {"name": "nf4", "block": 128, "double_quant": False},
    {"name": "fp4", "block": 32},
    {"name": "int8-dynamic", "block": 33},
]
ALL = [*NAMES, *OPTIONS]


def test_every_scheme_is_registered_with_a_summary() -> None:
    assert set(NAMES) <= set(registry.quantizer.names())
    for name in NAMES:
        assert name in registry.quantizer.describe(name)


@pytest.mark.parametrize("spec", ALL, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (24, 64), (10, 37), (16, 300)])
def test_layout_names_what_encode_makes(spec: str | dict[str, object], n: int, k: int) -> None:
    scheme = make_scheme(spec)
    weight = torch.randn(n, k)
    tensors = scheme.encode(weight)
    made = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert made == scheme.layout(n, k)
    decoded = scheme.decode(tensors, n, k)
    assert decoded.shape == weight.shape
    assert decoded.dtype == torch.float32
    assert float((decoded - weight).norm() / weight.norm()) < (0.2 if scheme.bits == 4 else 0.03)


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_config_survives_json(spec: str | dict[str, object]) -> None:
    config = make_scheme(spec).config
    again = make_scheme(json.loads(json.dumps(config.to_dict()))).config
    assert again == config
    assert make_scheme(config).config is config


def test_bad_specs() -> None:
    with pytest.raises(ValueError, match="did you mean 'nf4'"):
        make_scheme("nf5")
    with pytest.raises(ValueError, match="did you mean 'block'"):
        make_scheme({"name": "int8", "blok": 32})
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        make_scheme({"name": "nf4", "block": 0})
    with pytest.raises(TypeError, match=r"scheme\.block: expected int, got .all."):
        make_scheme({"name": "int8", "block": "all"})


@pytest.mark.parametrize("spec", ["nf4", "fp4", "int8-dynamic", "llm-int8"])
def test_only_row_formats_have_the_form_of_matmul_nbits(spec: str) -> None:
    assert QuantLinear.from_dense(nn.Linear(64, 8), spec).to_matmul_nbits() is None


@pytest.mark.parametrize(
    ("k", "block", "kernel"),
    [(64, 32, 32), (96, 128, 128), (96, None, 128), (8, None, 16), (1000, None, 256), (100, 7,
    None)],
)  # fmt: skip
def test_block_of_the_kernel(k: int, block: int | None, kernel: int | None) -> None:
    layer = QuantLinear.from_dense(nn.Linear(k, 8), {"name": "int8", "block": block})
    op = layer.to_matmul_nbits()
    if kernel is None:
        assert op is None
        return
    assert op is not None
    assert (op.block_size, op.K, op.N, op.bits) == (kernel, k, 8, 8)
    assert op.packed.shape == (8, -(-k // kernel), kernel)
    assert op.scales.shape == (8, -(-k // kernel))
