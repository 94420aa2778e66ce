"""Flowformer on images: size, work, stages, layout, bad configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.models.flowformer_vision import FlowformerVision

import effformer

TINY: dict[str, Any] = {
    "dims": (12, 24), "depths": (1, 2), "heads": 3, "input_size": 16, "num_classes": 5,
}  # fmt: skip


def build(**overrides: Any) -> FlowformerVision:
    model = effformer.build_model("flowformer-vision", **{**TINY, **overrides})
    assert isinstance(model, FlowformerVision)
    return model.eval()


def test_published_size_and_work() -> None:
    with torch.device("meta"):
        model = effformer.build_model("flowformer-vision")
    assert isinstance(model, FlowformerVision)
    assert sum(p.numel() for p in model.parameters()) == 43_311_304  # 43.31 M
    work, first, side = model.head.weight.numel(), 0, 56
    for embed, depth in zip(model.patch_embed, model.config.depths, strict=True):
        work += side * side * embed.proj.weight.numel()  # type: ignore[union-attr, operator]
        work += sum(block.macs(side * side) for block in model.blocks[first : first + depth])  # type: ignore[operator]
        first, side = first + depth, side // 2
    assert work == pytest.approx(6.87e9, rel=0.005)


def test_only_ffns_have_a_layer_scale() -> None:
    model = build(layer_scale=0.25)
    scaled = [name for name, _ in model.named_parameters() if name.endswith("layer_scale")]
    assert scaled == [f"blocks.{i}.ffn.layer_scale" for i in range(3)]
    assert build(layer_scale=None).config.layer_scale is None


def test_layers_and_drop_path_count_through_all_stages() -> None:
    model = build(layers={"1:": {"attn": "softmax"}}, drop_path=0.2)
    names = [block.attn.part.config.core.to_dict()["name"] for block in model.blocks]
    assert names == ["flow", "softmax", "softmax"]
    rates = [block.site.drop_path for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_official_layout_round_trip(tmp_path: Path) -> None:
    model, x = build(), torch.randn(2, 3, 16, 16)
    file = effformer.save_weights(model, tmp_path / "vision.safetensors", layout="official")
    state = effformer.io.read_weights(file)
    assert "blocks.1.1.mlp.fc1.weight" in state
    assert "blocks.1.1.gamma" in state
    other = build()
    assert effformer.load_weights(other, file).layout == "official"
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_saves_and_loads(tmp_path: Path) -> None:
    model, x = build(), torch.randn(2, 3, 16, 16)
    loaded = effformer.load_model(effformer.save_pretrained(model, tmp_path / "vision"))
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_bad_input_and_configs() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 3, 16, 16\), got \(1, 3, 8, 8\)"):
        build()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must have one entry per stage"):
        build(dims=(12, 24, 48))
    with pytest.raises(ValueError, match="input_size 20 is not divisible by 8"):
        build(input_size=20)
    with pytest.raises(ValueError, match="width 24 is not divisible by 5 heads"):
        build(dims=(10, 24), heads=5)


@pytest.mark.slow
def test_exports_with_any_batch() -> None:
    model = build()
    dims = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (), model.example_inputs(2), dynamic_shapes=dims)
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(program.module()(x=x), model(x), rtol=1e-4, atol=1e-5)
