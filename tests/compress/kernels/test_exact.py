"""The inference-ready form: same results, no gradients, cannot be saved."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from effformer.compress.kernels.exact import LeftLinear, PackedLinear
from effformer.compress.kernels.times import fastest
from torch import nn

import effformer
from effformer.checks import CapabilityError


def _model(**overrides: object) -> nn.Module:
    model = effformer.build_model("dit-nano", input_size=8, **overrides).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attn": "flow"},
        {"block": "macaron"},
        {"ffn": "swiglu"},
        {"ffn": {"act": "relu"}},
        {"ffn": {"act": "silu"}},
    ],
    ids=str,
)
def test_results_are_the_same(overrides: dict[str, object]) -> None:
    model = _model(**overrides)
    ready = effformer.optimize(model)
    inputs = model.example_inputs(3)
    with torch.no_grad():
        torch.testing.assert_close(ready(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)
    assert not [m for m in ready.modules() if type(m) is nn.Linear]
    assert [m for m in model.modules() if type(m) is nn.Linear], "the original is untouched"


@pytest.mark.parametrize(
    "overrides",
    [
        {"width": "dynamic", "tokens": "dynamic"},
        {"width": "dynamic", "attn": {"name": "nystrom", "landmarks": 4, "conv": 3}},
        {"block": "macaron", "width": "dynamic", "ffn": "swiglu"},
        {"width": {"name": "dynamic", "over": "ffn", "groups": 4}, "attn": "nystrom"},
    ],
    ids=str,
)
def test_forms_of_dynamic_width_are_made_ready(overrides: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = _model(**overrides)
    ready = effformer.optimize(model)
    inputs = model.example_inputs(6)
    inputs["t"] = torch.tensor([0, 100, 400, 400, 700, 999])
    with torch.no_grad():
        expected = model(**inputs)
        for _ in range(2):  # forms are made, then found
            torch.testing.assert_close(ready(**inputs), expected, rtol=1e-4, atol=1e-5)
    kept = [m.forms._kept for m in ready.modules() if hasattr(m, "forms")]
    forms = [form for some in kept for form in some.values()]
    assert forms
    assert not [m for form in forms for m in form.children() if type(m) is nn.Linear]


def test_any_module_can_be_optimized() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3, bias=False))
    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(effformer.optimize(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_macaron_factors_are_folded_exactly() -> None:
    block = effformer.optimize(_model(block="macaron")).blocks[0]  # type: ignore[index]
    assert [b.factor for b in block.branches] == [1.0, 1.0, 1.0]


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    ready = effformer.optimize(_model())
    with pytest.raises(ValueError, match="save the original"):
        effformer.save_pretrained(ready, tmp_path / "model")
    with pytest.raises(CapabilityError, match="train the original"):
        PackedLinear(nn.Linear(4, 4))(torch.randn(2, 4, requires_grad=True))
    with pytest.raises(
        CapabilityError, match=r"float32 weights on the CPU only, got torch.float64"
    ):
        effformer.optimize(_model().double())


def test_a_torch_without_onednn_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(CapabilityError, match="no oneDNN"):
        PackedLinear(nn.Linear(4, 4))
    model = _model()
    inputs = model.example_inputs(2)
    with torch.no_grad():
        ready = effformer.optimize(model)
        torch.testing.assert_close(ready(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [LeftLinear, PackedLinear])
@pytest.mark.parametrize("bias", [False, True])
def test_every_form_computes_the_same(form: type[nn.Module], bias: bool) -> None:
    linear = nn.Linear(12, 20, bias=bias)
    x = torch.randn(3, 5, 12)
    with torch.no_grad():
        out = form(linear)(x)
        assert out.shape == (3, 5, 20)
        torch.testing.assert_close(out, linear(x), rtol=1e-5, atol=1e-6)


def test_the_fastest_form_is_chosen() -> None:
    slow = {LeftLinear: [lambda: time.sleep(0.002)], PackedLinear: [lambda: None] * 4}
    assert fastest(slow) is PackedLinear
    with pytest.raises(ValueError, match="rows must be at least 1"):
        effformer.optimize(_model(), rows=0)
