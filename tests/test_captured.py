"""Modules that torch has captured, and operators that take functions: an answer, or one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import optimize, quantize
from effformer.export import export_onnx
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import effformer
from effformer.checks import CapabilityError
from effformer.profile import latency, profile

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Dropout(), nn.Linear(32, 8)).eval()


def _scripts() -> dict[str, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is old
        traced: Any = torch.jit.trace(_net(), X)
        return {
            "scripted": torch.jit.script(_net()),
            "traced": traced,
            "frozen": torch.jit.freeze(traced),
            "traced part": nn.Sequential(traced, nn.Linear(8, 8)),
        }


def _refusing(tmp_path: Path) -> dict[str, Callable[[Any], object]]:
    return {
        "profile": lambda m: profile(m, X, cross_check=True),
        "export_onnx": lambda m: export_onnx(m, tmp_path / "m.onnx", X),
        "quantize": lambda m: quantize(m, "int8"),
        "optimize": optimize,
        "latency": lambda m: latency(m, X, compile=True),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_timed_saved_and_otherwise_refused(tmp_path: Path) -> None:
    for kind, script in _scripts().items():
        assert latency(script, X, warmup=0, runs=1).runs == 1
        for where, call in _refusing(tmp_path).items():
            with pytest.raises(CapabilityError, match=f"^{where}: .* is TorchScript") as caught:
                call(script)
            assert "give the module that it was made of" in str(caught.value)
        if kind != "frozen":  # whose weights are constants
            effformer.load_weights(
                script, effformer.save_weights(script, tmp_path / "w.safetensors", force=True)
            )


def test_exported_modules_are_measured_and_exported(tmp_path: Path) -> None:
    net = _net()
    program = torch.export.export(net, (X,))
    module: Any = program.module()
    assert profile(module, X, cross_check=True).total == profile(net, X).total
    assert latency(module, X, warmup=0, runs=1).runs == 1
    assert export_onnx(module, tmp_path / "m.onnx", X, dynamic=None).parity is not None
    for where, call in _refusing(tmp_path).items():
        with pytest.raises(
            TypeError, match=rf"^{where}: .*got ExportedProgram; give what its module\(\) returns"
        ):
            call(program)
    with pytest.raises(TypeError, match=r"^profile: model: expected Module, got 3"):
        profile(3, X)  # type: ignore[arg-type]


class _Flex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed: Any = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + 0.1 * (i - j))
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_counts_all_pairs(tmp_path: Path) -> None:
    net = _Flex().eval()
    cost = profile(net, X, cross_check=True)
    assert cost.by_op["higher_order::flex_attention"] == 2 * 2 * 5 * 5 * (8 + 8)
    assert cost.total == 2 * 5 * 16 * (48 + 16) + 2 * 2 * 5 * 5 * 16
    assert set(cost.uncounted) <= {"aten::sort"}  # of its mask over blocks
    assert cost.memory is not None
    assert cost.memory.saved is None
    assert latency(net, X, warmup=0, runs=1).runs == 1
    with pytest.raises(
        ValueError, match=r"^export_onnx: _Flex cannot be translated to opset"
    ) as caught:
        export_onnx(net, tmp_path / "m.onnx", X)
    assert len(str(caught.value)) < 400
