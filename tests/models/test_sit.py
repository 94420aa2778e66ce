from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effformer.models import DiT, SiT
from effformer.models.sit import PRESETS

import effformer

SMALL = {"input_size": 8, "num_classes": 10}


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_those_of_dit(name: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    assert isinstance(model, SiT)
    if PRESETS[name].params is not None:
        assert sum(p.numel() for p in model.parameters()) == PRESETS[name].params


def test_predicts_a_velocity_with_the_network_of_dit(tmp_path: Path) -> None:
    sit = effformer.build_model("sit-nano", **SMALL).eval()
    assert not sit(**sit.example_inputs(2)).any()
    with torch.no_grad():
        for p in sit.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    path = effformer.save_weights(sit, tmp_path / "w.safetensors", "official")
    dit = effformer.build_model("dit-nano", **SMALL).eval()
    assert effformer.load_weights(dit, path).layout == "official"
    given = sit.example_inputs(2)
    assert given["t"].is_floating_point()
    assert float(given["t"].min()) >= 0
    assert float(given["t"].max()) <= 1
    out = sit(**given)
    assert out.shape == (2, 4, 8, 8)
    torch.testing.assert_close(out, dit(**given)[:, :4], rtol=0, atol=0)


def test_without_variance_channels() -> None:
    sit = effformer.build_model("SiT-S/8", depth=1, learn_sigma=False, input_size=16)
    assert sit.name == "sit-s-8"
    assert sit.out_channels == 4
    assert sit(**sit.example_inputs(1)).shape == (1, 4, 16, 16)


def test_saved_models_come_back_as_sit(tmp_path: Path) -> None:
    sit = effformer.build_model("sit-nano", **SMALL, attn="flow")
    effformer.save_pretrained(sit, tmp_path / "m")
    again = effformer.load_model(tmp_path / "m")
    assert type(again) is SiT
    assert again.config == sit.config
    assert not issubclass(SiT, DiT)
