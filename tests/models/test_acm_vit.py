"""ViT of adaptive computation modules: published counts, torchvision's keys."""

from __future__ import annotations

import pytest
import torch
from effformer.models import ViT
from torch import nn

import effformer
from effformer.attention import Attention
from effformer.checks import FormatError

torchvision = pytest.importorskip("torchvision", reason="extra 'vision' is not installed")


def test_published_parameters_of_a_block() -> None:
    with torch.device("meta"):
        model = effformer.build_model("vit-b-16-acm", depth=1)
        dense = effformer.build_model("vit-b-16", depth=1)

    def count(m: nn.Module) -> int:
        return sum(p.numel() for n, p in m.blocks.named_parameters() if ".norm." not in n)

    assert count(model) == 7_145_733
    assert count(dense) == 7_084_800


def theirs() -> nn.Module:
    model: nn.Module = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=40,
        num_classes=5,
    ).eval()  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def ours(**options: object) -> ViT:
    config = ViT.Config(dim=16, depth=2, heads=2, image_size=16, patch=8, num_classes=5)
    return ViT(config.replace(**{"ffn": {"hidden": 40}, **options})).eval()


@pytest.mark.parametrize("old", [False, True])
def test_weights_of_torchvision_agree(old: bool) -> None:
    peer, model, x = theirs(), ours(), torch.randn(3, 3, 16, 16)
    state = peer.state_dict()
    if old:  # spelling of its first releases
        state = {
            k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
            for k, v in state.items()
        }
    assert effformer.load_weights(model, state).layout == "torchvision"
    torch.testing.assert_close(model(x), peer(x), rtol=1e-4, atol=1e-5)
    layout = next(lay for lay in ViT.LAYOUTS if lay.name == "torchvision")
    back = layout.from_ours(dict(model.state_dict()), model.config)
    torch.testing.assert_close(back, dict(peer.state_dict()))


@pytest.mark.parametrize("projections", [None, {"out_bias": True}])
def test_adaptive_keys_round_trip(projections: dict[str, object] | None) -> None:
    model, other = (
        ours(attn={"projections": projections}, ffn={"name": "acm", "hidden": 40}) for _ in range(2)
    )
    layout = next(lay for lay in ViT.LAYOUTS if lay.name == "torchvision")
    official = layout.from_ours(dict(model.state_dict()), model.config)
    assert "encoder.layers.encoder_layer_1.mlp.w1" in official
    key = "encoder.layers.encoder_layer_1.self_attention.o_proj.gating_network.net.0.weight"
    assert (key in official) is (projections is not None)
    assert effformer.load_weights(other, official).layout == "torchvision"
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()))


def test_adaptive_layers_among_dense_ones() -> None:
    layers = {
        "0": {"ffn": {"name": "acm", "hidden": 30, "learners": 3}},
        "-1": {"attn": {"projections": {"width": 5, "learners": 2}}},
    }
    model, other, dense, x = (
        *(ours(layers=layers) for _ in range(2)),
        ours(),
        torch.randn(2, 3, 16, 16),
    )
    layout = next(lay for lay in ViT.LAYOUTS if lay.name == "torchvision")
    official = layout.from_ours(dict(model.state_dict()), model.config)
    place = "encoder.layers.encoder_layer_{}.self_attention.{}"
    assert place.format(0, "out_proj.weight") in official
    assert official[place.format(1, "o_proj.w1")].shape == (16, 10)
    assert effformer.load_weights(other, official).layout == "torchvision"
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    with pytest.raises(FormatError, match=r"unexpected: .*ffn\.part\.learners"):
        effformer.load_weights(dense, official)


def test_other_blocks_cannot_be_written() -> None:
    model = ours(block="macaron")
    layout = next(lay for lay in ViT.LAYOUTS if lay.name == "torchvision")
    with pytest.raises(FormatError, match=r"no name for blocks\.0\.ffn1"):
        layout.from_ours(dict(model.state_dict()), model.config)
    assert isinstance(model.config.attn, Attention.Config)
