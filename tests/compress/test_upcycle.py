"""From a dense model to mixtures of experts that compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import quantize, upcycle

import effformer
from effformer.checks import CapabilityError


def awake(name: str) -> Any:
    torch.manual_seed(0)
    model = effformer.build_model(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("vit-nano", 0),
        ("triposg-nano", 1),
        ("mmdit-nano", 2),
        ("triflow-tiny", 0),
        ("triposg-vae-tiny", 1),
    ],
)
def test_the_function_stays(name: str, shared: int, tmp_path: Path) -> None:
    model = awake(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wide, report = upcycle(model, {"experts": 3, "top_k": 2, "shared": shared})
    assert report.params_after > report.params_before
    assert all(place.startswith("blocks.") for place in report.places)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    inputs = model.example_inputs(2)
    with torch.no_grad():
        assert_close(wide(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)
    again: Any = effformer.load_model(effformer.save_pretrained(wide, tmp_path / "m"))
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs), wide(**inputs))
    wide.train()(**inputs).square().sum().backward()
    routers = [m.router.weight for m in wide.modules() if hasattr(m, "router")]
    assert len(routers) == len(report.places)
    assert all(r.grad is not None for r in routers)


def test_only_what_where_covers() -> None:
    model = awake("vit-nano")
    wide, report = upcycle(model, {"experts": 2}, "blocks.1")
    assert report.places == ("blocks.1.ffn.part",)
    assert wide.config.at("blocks.1.ffn.experts") == 2
    with pytest.raises(CapabilityError, match="is 'moe'; copies of an 'mlp'"):
        upcycle(wide)
    with pytest.raises(ValueError, match="matches no module"):
        upcycle(model, where="blocks.5")
    with pytest.raises(ValueError, match="top_k <= experts"):
        upcycle(model, {"experts": 1})
    with pytest.raises(CapabilityError, match="upcycle first"):
        upcycle(quantize(model, "int8")[0])
