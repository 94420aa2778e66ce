from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import quantize
from effformer.export import (
    ExportError,
    ExportReport,
    VerificationError,
    export_onnx,
)
from torch import Tensor, nn

import effformer
from effformer.checks import FormatError

from .networks import Mlp, Tokens, randomize

SLOW = pytest.mark.slow


def test_facts_of_a_plain_module(exported: ExportReport) -> None:
    facts = exported.graph
    assert (facts.opset, facts.domains) == (20, {})
    assert facts.inputs[0].shape == ("batch", 5, 32)
    assert facts.outputs[0].name == "output"
    assert facts.operators["Gelu"] == 1
    assert facts.weights >= 32 * 64 + 64 + 64 * 8 + 8
    assert facts.bytes == exported.path.stat().st_size
    assert facts.metadata["effformer.model"] == "Mlp"
    assert exported.parity is not None
    assert exported.parity.max_rel <= 1e-4
    batches = [case.shapes["x"][0] for case in exported.parity.cases]
    assert batches[0] == 2
    assert 1 in batches
    assert len(batches) == len(set(batches)) == 1 + 3


def test_the_file_holds_no_local_paths(exported: ExportReport) -> None:
    assert b'File "' not in exported.path.read_bytes()
    assert os.fsencode(Path(effformer.__file__).parent) not in exported.path.read_bytes()


def test_modes_and_weights_are_left_alone(tmp_path: Path) -> None:
    model = Mlp().train()
    model.fc1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 32))
    assert (model.training, model.drop.training, model.fc1.training) == (True, True, False)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_named_axes_of_two_inputs_two_outputs_and_a_constant(tmp_path: Path) -> None:
    inputs = {"ids": torch.randint(0, 11, (1, 6)), "mask": torch.ones(1, 6).bool(), "scale": 0.5}
    axes = {"ids": {0: "rows", 1: "tokens"}, "mask": {0: "rows", 1: "tokens"}}
    names = ["tokens_out", "pooled"]
    report = export_onnx(Tokens(), tmp_path / "t.onnx", inputs, dynamic=axes, output_names=names)
    assert [(v.name, v.shape) for v in report.graph.inputs] == [
        ("ids", ("rows", "tokens")),
        ("mask", ("rows", "tokens")),
    ]
    assert [(v.name, v.shape) for v in report.graph.outputs] == [
        ("tokens_out", ("rows", "tokens", 16)),
        ("pooled", ("rows", 16)),
    ]
    assert report.parity is not None
    assert len({case.shapes["ids"] for case in report.parity.cases}) == 1 + 3


def test_fixed_lengths(tmp_path: Path) -> None:
    report = export_onnx(Mlp(), tmp_path / "m.onnx", (torch.randn(1, 32),), dynamic=None)
    assert report.graph.inputs[0].shape == (1, 32)


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["softmax", pytest.param("flow", marks=SLOW)])
def test_dit_with_any_grid(attn: str, tmp_path: Path) -> None:
    model = effformer.build_model("sit-nano", attn=attn, input_size=8, depth=1, num_classes=5)
    report = export_onnx(randomize(model), tmp_path / "sit.onnx")
    assert report.graph.inputs[0].shape == ("batch", 4, "height", "width")
    assert report.graph.metadata["effformer.model"] == "sit-nano"
    assert '"depth": 1' in report.graph.metadata["effformer.config"]
    assert report.parity is not None
    grids = {case.shapes["x"][2:] for case in report.parity.cases}
    assert len(grids) == 1 + 3
    assert any(h != w for h, w in grids)


@pytest.mark.parametrize(
    "scheme", ["int8", *(pytest.param(name, marks=SLOW) for name in ("int4", "svdquant")), "nf4"]
)
def test_quantized_layers_stay_packed(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 64))
    small, packed = quantize(model, scheme, data=torch.randn(40, 128), sensitive=None)
    report = export_onnx(small, tmp_path / "q.onnx", torch.randn(2, 3, 128))
    floats = 4 * sum(p.numel() for p in model.parameters())
    limit = {"int8": 0.29, "int4": 0.18, "nf4": 0.18, "svdquant": 0.4}[scheme]
    assert report.graph.bytes <= limit * floats
    assert report.graph.bytes <= packed.bytes_after + 0.05 * floats
    kernels = report.graph.operators.get("com.microsoft::MatMulNBits", 0)
    assert kernels == (2 if scheme in ("int8", "int4") else 0)
    assert all(type(layer).__name__ == "QuantLinear" for layer in (small[0], small[2]))


@pytest.mark.parametrize(
    "scheme",
    [
        {"name": "int8", "symmetric": False},
        *(pytest.param(name, marks=SLOW) for name in ("fp4", "int8-dynamic", "llm-int8", "int4")),
    ],
)
def test_every_format_on_a_runtime_without_the_kernel(scheme: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small, _ = quantize(Mlp(dim=48, hidden=130, out=20), scheme, sensitive=None)
    report = export_onnx(small, tmp_path / "q.onnx", torch.randn(2, 48), target="onnx")
    assert not report.graph.domains
    assert report.parity is not None
    assert report.parity.max_rel <= 1e-4


def test_writing_a_slice_is_two_pieces_and_not_a_scatter(tmp_path: Path) -> None:
    class Slices(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y[:, 1:3].mul_(2.0)
            y[:, ::2] += 1.0
            return y * torch.arange(3.0)[torch.tensor([0, 2, 1, 1, 0], dtype=torch.int32)]

    report = export_onnx(Slices(), tmp_path / "s.onnx", torch.randn(2, 5))
    assert report.graph.operators["Concat"] == 1


def test_an_interruption_leaves_what_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mlp: Mlp
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "m.onnx"
    export_onnx(mlp, target, torch.randn(2, 32))
    there = target.read_bytes()
    monkeypatch.setattr("effformer.export.onnx.verify_onnx", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(mlp, target, torch.randn(2, 32))
    assert target.read_bytes() == there
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]


def test_a_failed_verification_leaves_what_was_there(tmp_path: Path, mlp: Mlp) -> None:
    target = tmp_path / "m.onnx"
    export_onnx(mlp, target, torch.randn(2, 32))
    there = target.read_bytes()
    with pytest.raises(VerificationError, match="differs from torch's"):
        export_onnx(mlp, target, torch.randn(2, 32), tolerance=1e-30)
    assert target.read_bytes() == there
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_says_why(tmp_path: Path, mlp: Mlp) -> None:
    x, path = torch.randn(2, 32), tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="Branches cannot be traced"):
        export_onnx(Branches(), path, x)
    with pytest.raises(TypeError, match="has no example_inputs"):
        export_onnx(mlp, path)
    with pytest.raises(TypeError, match=r"do not fit Mlp.forward\(x"):
        export_onnx(mlp, path, {"z": x})
    with pytest.raises(TypeError, match="'x' is a list of tensors"):
        export_onnx(mlp, path, {"x": [x]})
    with pytest.raises(ValueError, match="unknown input 'xx'; did you mean 'x'"):
        export_onnx(mlp, path, x, dynamic={"xx": {0: "batch"}})
    with pytest.raises(ValueError, match=r"'x' has axes 0..1, got 2"):
        export_onnx(mlp, path, x, dynamic={"x": {2: "batch"}})
    with pytest.raises(ValueError, match="'my batch' is not a name"):
        export_onnx(mlp, path, x, dynamic={"x": {0: "my batch"}})
    with pytest.raises(ValueError, match="dynamic is 'auto', None or a dict"):
        export_onnx(mlp, path, x, dynamic="all")
    with pytest.raises(ValueError, match="unknown target 'onnx-cpus'"):
        export_onnx(mlp, path, x, target="onnx-cpus")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path, mlp: Mlp) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match="cannot be written"):
        export_onnx(mlp, tmp_path / "file" / "m.onnx", torch.randn(2, 32))


def test_an_opset_that_the_target_does_not_have(tmp_path: Path, mlp: Mlp) -> None:
    with pytest.raises(ValueError, match="takes opsets 18 to 23, got 24"):
        export_onnx(mlp, tmp_path / "m.onnx", torch.randn(2, 32), opset=24)
    assert not list(tmp_path.iterdir())


def test_import_loads_no_torch() -> None:
    code = "import sys, effformer.export, effformer.export.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_tolerances_are_positive(tmp_path: Path, mlp: Mlp, tolerance: float) -> None:
    with pytest.raises(ValueError, match="export_onnx: tolerance must be positive"):
        export_onnx(mlp, tmp_path / "m.onnx", torch.randn(2, 5, 32), tolerance=tolerance)
    assert list(tmp_path.iterdir()) == []


def test_inputs_and_names_that_no_graph_takes(tmp_path: Path, mlp: Mlp) -> None:
    place = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match=r"input 'x' of shape \(0, 5, 32\) is empty"):
        export_onnx(mlp, place, torch.ones(0, 5, 32))
    with pytest.raises(TypeError, match=r"input 'x' is torch.sparse_coo; give a dense tensor"):
        export_onnx(mlp, place, torch.ones(2, 5, 32).to_sparse())
    for name in ("", "x", "a\0b"):
        with pytest.raises(ValueError, match="output_names must be words that differ"):
            export_onnx(mlp, place, torch.ones(2, 5, 32), output_names=[name], verify=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verify", [True, False])
def test_bfloat16_is_refused_before_the_trace(tmp_path: Path, verify: bool) -> None:
    plain, given = nn.Linear(4, 2).bfloat16(), torch.ones(2, 4, dtype=torch.bfloat16)
    with pytest.raises(ExportError, match=r"Linear computes in bfloat16.*model\.float\(\)"):
        export_onnx(plain, tmp_path / "m.onnx", given, verify=verify)
    with pytest.raises(ExportError, match=r"GELU computes in bfloat16"):
        export_onnx(nn.GELU(), tmp_path / "m.onnx", given, verify=verify)
    assert not list(tmp_path.iterdir())
