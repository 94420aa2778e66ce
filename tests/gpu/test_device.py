"""Compiling, choosing a backend, and resuming a run on a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from contract import context_for, make_mixer, tokens
from devices import DEVICES
from effformer.compress import quantize
from torch import Tensor, nn

import effformer
from effformer.attention.backends import attend
from effformer.checks import CapabilityError
from effformer.train import Batch, Classification, TrainConfig, load_data, train

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize("name", ["softmax", "flow", "sana", "gated-delta"])
def test_compiles(name: str, device: str) -> None:
    part, x = make_mixer(name).to(device), tokens(64).to(device)
    ctx = context_for(part, x)
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    with torch.no_grad():
        compiled = torch.compile(part, fullgraph=True, backend=backend)
        assert_close(compiled(x, ctx), part(x, ctx), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
def test_backends_agree(backend: str, causal: bool, device: str) -> None:
    q, k, v = (torch.randn(2, 3, 64, 32) for _ in range(3))
    exact = attend("reference", *(x.double() for x in (q, k, v)), None, causal=causal, scale=None)
    here = [x.to(device) for x in (q, k, v)]
    if backend == "xformers":
        pytest.importorskip("xformers")
        if device == "cpu":
            with pytest.raises(CapabilityError, match="CUDA devices only"):
                attend(backend, *here, None, causal=causal, scale=None)
            return
    out = attend(backend, *here, None, causal=causal, scale=None)
    assert_close(out.double().cpu(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", ["nf4", "llm-int8"])
def test_packed_backends_agree(scheme: str, device: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = effformer.build_model("vit-nano").eval().to(device)
    inputs = {name: x.to(device) for name, x in model.example_inputs(2).items()}
    outputs = []
    with torch.no_grad():
        for backend in ("torch", "bitsandbytes"):
            packed, _ = quantize(model, {"name": scheme}, backend=backend)
            outputs.append(packed(**inputs))
    assert_close(outputs[1], outputs[0], rtol=1e-2, atol=1e-2)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuBLAS reads its variable when the first product is made; `tools/gpu_check.sh` sets it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumes_exactly(dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    data = load_data("digits").subset(torch.arange(32))
    config = TrainConfig(steps=12, batch=8, warmup=2, lr=1e-3, ema=0.9)

    def trained(out: Path, fails: int) -> list[Tensor]:
        calls = iter(range(1, 13))

        def objective(network: nn.Module, batch: Batch, *rest: Any) -> Tensor:
            if next(calls) == fails:
                raise InterruptedError
            return Classification()(network, {**batch, "x": batch["x"].to(dtype)}, *rest)

        torch.manual_seed(0)
        model = effformer.build_model(
            "vit-nano", attn="linear", image_size=8, channels=1, patch=2, num_classes=10
        ).to(device, dtype)
        train(model, data, objective, config, out=out, resume=True, save_every=5)
        return [p.detach() for p in model.parameters()]

    whole = trained(tmp_path / "whole", fails=0)
    with pytest.raises(InterruptedError):
        trained(tmp_path / "parts", fails=8)
    for right, resumed in zip(whole, trained(tmp_path / "parts", fails=0), strict=True):
        assert torch.equal(right, resumed)
