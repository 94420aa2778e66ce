from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from effformer.compress.quant import QuantEmbedding, QuantLinear, make_scheme, select_backend
from torch import nn

from effformer.checks import MissingExtra

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def bitsandbytes() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def test_selection(bitsandbytes: ModuleType) -> None:
    nf4, int8 = make_scheme("nf4"), make_scheme("int8")
    assert select_backend("torch", nf4, CUDA) == "torch"
    assert select_backend("bitsandbytes", nf4, CPU) == "bitsandbytes"
    assert select_backend("auto", nf4, CPU) == "torch"
    assert select_backend("auto", nf4, CUDA) == "bitsandbytes"
    assert select_backend("auto", int8, CUDA) == "torch"
    with pytest.raises(ValueError, match="did you mean 'bitsandbytes'"):
        select_backend("bitsandbyte", nf4, CPU)
    with pytest.raises(ValueError, match="'int8' is not a bitsandbytes format; choices: nf4"):
        select_backend("bitsandbytes", int8, CPU)
    with pytest.raises(ValueError, match="no block 48"):
        select_backend("bitsandbytes", make_scheme({"name": "nf4", "block": 48}), CPU)


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *args: Any) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert select_backend("auto", make_scheme("nf4"), CUDA) == "torch"
    with pytest.raises(MissingExtra, match="pip install"):
        select_backend("bitsandbytes", make_scheme("nf4"), CPU)


@pytest.mark.parametrize(
    "scheme",
    [
        "nf4",
        "fp4",
        {"name": "nf4", "block": 256, "double_quant": False},
        "int8-dynamic",
        "llm-int8",
    ],
    ids=str,
)
def test_both_backends_agree(scheme: str | dict[str, object], bitsandbytes: ModuleType) -> None:
    dense = nn.Linear(96, 50)
    ours = QuantLinear.from_dense(dense, scheme)
    theirs = QuantLinear.from_dense(dense, scheme, backend="bitsandbytes")
    assert theirs.backend == "bitsandbytes"
    for name, tensor in ours.tensors().items():
        assert torch.equal(tensor, theirs.tensors()[name]), name
    torch.testing.assert_close(theirs.weight, ours.weight, rtol=1e-6, atol=1e-8)
    x = torch.randn(4, 96, requires_grad=True)
    theirs(x).sum().backward()
    torch.testing.assert_close(x.grad, ours.weight.sum(0).expand(4, 96))
    table = QuantEmbedding.from_dense(nn.Embedding(9, 64), scheme, backend="bitsandbytes")
    torch.testing.assert_close(table(torch.tensor([2, 8])), table.weight[[2, 8]])
    exported = torch.export.export(theirs, (torch.randn(2, 96),))
    assert "bitsandbytes" not in str(exported.graph)
