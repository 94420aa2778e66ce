from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from effformer.models import ViT, vit_config_from_timm
from effformer.models.vit import PRESETS
from torch import Tensor, nn

import effformer
from effformer.attention import Attention
from effformer.checks import CapabilityError, FormatError
from effformer.context import Tap
from effformer.nn.embeddings import resize_positions

NAMES = timm.list_models("vit_*")
# Models that effformer does not take, and why. There are none: keep it so.
REFUSED: dict[str, str] = {}


def shrunk(name: str, **options: Any) -> nn.Module:
    """A small timm model of the same parts, with weights that make every one of them matter."""
    found = re.search(r"patch(\d+)", name)
    if "mci" in name or "_r_" in name or re.search(r"_r(es)?n?e?t?\d+", name):
        options = {"img_size": 64, **options}
        if "mci" not in name:
            options = {"embed_dim": 48, "num_heads": 2, **options}
    else:
        patch = int(found[1]) if found else 16
        options = {"img_size": (2 * patch, 3 * patch), "embed_dim": 48, "num_heads": 2, **options}
    if "sapiens2" in name:
        options["num_kv_heads"] = (2, 1)
    model: nn.Module = timm.create_model(name, depth=2, num_classes=7, **options).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() < 2 or key.endswith(("_token", "pos_embed", "latent", "freqs")):
                p.add_(torch.randn_like(p) * 0.3)
            else:
                p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
        for key, b in model.named_buffers():
            if key.endswith("running_var"):
                b.uniform_(0.5, 1.5)
    return model


def images(model: Any, batch: int = 2) -> Tensor:
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size)


def check(name: str, **options: Any) -> None:
    """Config inferred, weights loaded, outputs equal, keys written back."""
    theirs = shrunk(name, **options)
    config = vit_config_from_timm(theirs)
    assert ViT.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    ours, state = ViT(config).eval(), theirs.state_dict()
    report = effformer.load_weights(ours, state)
    x = images(theirs)
    with torch.no_grad():
        expected, actual = theirs(x), ours(x)
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    layout = next(lay for lay in ours.LAYOUTS if lay.name == report.layout)
    back = layout.from_ours(ours.state_dict(), config)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "name",
    [
        name if i % 10 == 0 else pytest.param(name, marks=pytest.mark.slow)
        for i, name in enumerate(NAMES)
    ],
)
def test_every_vit_of_timm_agrees(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(CapabilityError, match=re.escape(REFUSED[name])):
            vit_config_from_timm(name)
    else:
        check(name)


def test_registers_count_as_features_but_not_in_the_mean() -> None:
    theirs = shrunk("vit_little_patch16_reg4_gap_256")
    ours = ViT(vit_config_from_timm(theirs)).eval()
    effformer.load_weights(ours, theirs.state_dict())
    x = images(theirs)
    features = theirs.forward_features(x)  # type: ignore[operator]
    torch.testing.assert_close(ours.forward_features(x), features)
    assert ours.forward_features(x).shape == (2, 4 + 6, 48)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avgmax"}, "global_pool='avgmax'"),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, "a norm inside attention"),
        ("vit_tiny_patch16_224", {"scale_mlp_norm": True}, "a norm inside the FFN"),
        ("vit_tiny_patch16_224", {"act_layer": "hard_swish"}, "the activation"),
        ("vit_tiny_patch16_224", {"norm_layer": "simplenorm"}, "norms of type SimpleNorm"),
        ("vit_tiny_patch16_224", {"patch_size": (16, 8)}, "patches of unequal sides"),
        ("eva02_base_patch14_448", {}, "a norm inside the FFN"),
    ],
)
def test_refuses_parts_it_does_not_have(name: str, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name, depth=1, **options)
    with pytest.raises(CapabilityError, match=message):
        vit_config_from_timm(theirs)


def test_refuses_other_models() -> None:
    with pytest.raises(TypeError, match=r"resnet18: expected one of timm's classes .*, got ResNet"):
        vit_config_from_timm("resnet18")
    with pytest.raises(TypeError, match="got VisionTransformerDistilled"):
        vit_config_from_timm("deit_tiny_distilled_patch16_224")


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    published = PRESETS[name].params
    if published is not None:
        assert sum(p.numel() for p in model.parameters()) == published


@pytest.mark.parametrize("name", [n for n in PRESETS if PRESETS[n].aliases])
def test_aliases_name_the_same_model_in_timm(name: str) -> None:
    alias = PRESETS[name].aliases[0]
    with torch.device("meta"):
        theirs = timm.create_model(alias, num_classes=1000)  # some published heads have other sizes
        assert effformer.build_model(alias, depth=1).name == name
    assert vit_config_from_timm(theirs) == PRESETS[name].config
    assert sum(p.numel() for p in theirs.parameters()) == PRESETS[name].params


@pytest.mark.parametrize(
    "options",
    [
        {"attn": "flow"},
        {"attn": "linear", "ffn": "swiglu"},
        {"attn": "relative"},
        {"attn": "differential"},
        {"block": "macaron"},
        {"block": "parallel", "layer_scale": 1e-2},
        {"block": "parallel-branches", "drop_path": 0.1},
        {"block": "respost"},
        {"layers": {"0": {"attn": "flow"}, "-1": {"ffn": "geglu", "block": "macaron"}}},
        {"prefix": {"registers": 3}, "head": {"pool": "map"}},
        {"positions": {"absolute": False, "rope": {"kind": "centered", "interleaved": False}}},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_swaps_build_learn_and_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = effformer.build_model("vit-nano", **options)
    x = model.example_inputs(2)["x"]
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    effformer.save_pretrained(model, tmp_path / "m")
    again = effformer.load_model(tmp_path / "m")
    assert again.config == model.config
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_options_of_a_group_keep_the_others() -> None:
    model = effformer.build_model("vit-nano", prefix={"class_token": False}, head={"pool": "avg"})
    changed = model.config.replace(prefix={"registers": 2})
    assert (changed.prefix.class_token, changed.prefix.registers) == (False, 2)


@pytest.mark.parametrize(("side", "channels", "patch"), [(8, 1, 2), (28, 1, 4), (32, 3, 4)])
def test_small_images(side: int, channels: int, patch: int) -> None:
    model = effformer.build_model("vit-tiny", image_size=side, channels=channels, patch=patch)
    assert model(torch.randn(2, channels, side, side)).shape == (2, 10)


def test_order_of_patches_does_not_matter_without_positions() -> None:
    model = effformer.build_model(
        "vit-nano",
        positions={"absolute": False},
        prefix={"class_token": False},
        head={"pool": "avg"},
    ).eval()
    x = torch.randn(1, 1, 8, 8)
    rows = x.unflatten(2, (4, 2))[:, :, [2, 0, 3, 1]].flatten(2, 3)
    torch.testing.assert_close(model(rows), model(x))


def test_rope_tables_serve_every_size() -> None:
    model = effformer.build_model(
        "vit-nano", positions={"absolute": False, "rope": {"kind": "axial"}}
    ).eval()
    assert model(torch.randn(2, 1, 12, 6)).shape == (2, 10)
    assert model.dynamic_axes() == {"x": {0: "batch", 2: "height", 3: "width"}}
    assert effformer.build_model("vit-nano").dynamic_axes() == {"x": {0: "batch"}}


def test_resized_interpolates_positions_as_timm_does() -> None:
    theirs = shrunk("vit_little_patch16_reg4_gap_256")
    ours = ViT(vit_config_from_timm(theirs)).eval()
    effformer.load_weights(ours, theirs.state_dict())
    bigger = ours.resized((64, 80))
    theirs.set_input_size(img_size=(64, 80))  # type: ignore[operator]
    x = images(theirs)
    torch.testing.assert_close(bigger(x), theirs(x))
    assert not bigger.training
    assert ours.config.size == (32, 48)


def test_resizing_is_never_silent() -> None:
    model = effformer.build_model("vit-nano")
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 1, 8, 8\), got \(1, 1, 12, 12\)"):
        model(torch.zeros(1, 1, 12, 12))
    state = model.LAYOUTS[-1].from_ours(model.state_dict(), model.config)
    larger = effformer.build_model("vit-nano", image_size=16)
    with pytest.raises(FormatError, match=r"pos_embed has 17 entries, but image_size=16 needs 65"):
        effformer.load_weights(larger, state)
    with pytest.raises(ValueError, match=r"resize_positions: expected \(1, 1 \+ 3 \* 3, D\)"):
        resize_positions(torch.zeros(1, 9, 4), (3, 3), (4, 4), front=1)
    assert resize_positions(torch.ones(1, 9, 4), (3, 3), (2, 5)).shape == (1, 10, 4)


def test_resize_before_structural_changes() -> None:
    model, _ = effformer.compress.quantize(effformer.build_model("vit-nano"), "int8")
    with pytest.raises(ValueError, match=r"was changed by 'quantize \(int8\)'; resize before that"):
        model.resized(16)
    model.transforms = ({"kind": "cut"},)
    with pytest.raises(ValueError, match="was changed by 'cut'; resize before that"):
        model.resized(16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_size": 9}, ValueError, "image_size 9 is not divisible by 2"),
        ({"prefix": {"class_token": False}}, ValueError, "head pool 'token' needs"),
        ({"prefix": {"registers": -1}}, ValueError, "registers must be at least 0"),
        ({"prefix": {"tokens": 1}}, ValueError, "unknown option 'tokens'"),
        ({"head": {"pool": "max"}}, ValueError, "unknown value 'max'"),
        ({"block": "adaln-zero"}, CapabilityError, "needs a conditioning vector"),
        (
            {"attn": "gla", "positions": {"rope": {}}},
            CapabilityError,
            "'gla' cannot apply rotary",
        ),
        ({"attn": {"kv_heads": 3}}, ValueError, "2 heads cannot share 3; kv_heads"),
        ({"stem": {"kind": "conv", "layers": [1]}, "image_size": 64}, ValueError, "does not fit"),
        ({"positions": {"rope": {"kind": "mixed", "interleaved": False}}}, ValueError, "mixed"),
        ({"heads": 8, "positions": {"rope": {}}}, ValueError, "must be divisible by 4"),
        ({"channels": 0}, ValueError, "channels must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        effformer.build_model("vit-nano", **options)


def test_bad_inputs() -> None:
    model = effformer.build_model("vit-nano")
    with pytest.raises(ValueError, match=r"vit-nano: x: expected shape \(B, 1, 8, 8\)"):
        model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="x must be floating point"):
        model(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match="expected a tensor"):
        model([[0.0]])
    free = effformer.build_model("vit-nano", positions={"absolute": False})
    with pytest.raises(ValueError, match="is not divisible by 2"):
        free(torch.zeros(1, 1, 7, 8))


def test_layouts_refuse_what_they_cannot_say(tmp_path: Path) -> None:
    macaron = effformer.build_model("vit-nano", block="macaron")
    with pytest.raises(FormatError, match="layout 'timm' has no block='macaron'"):
        effformer.save_weights(macaron, tmp_path / "w.safetensors", "timm")
    model = effformer.build_model("vit-nano", attn="relative")
    layouts = {lay.name: lay for lay in model.LAYOUTS}
    with pytest.raises(FormatError, match="one bias function, the blocks' differ"):
        layouts["timm-srelpos"].from_ours(model.state_dict(), model.config)
    nn.init.ones_(model.blocks[0].attn.part.qkv.bias)
    with pytest.raises(FormatError, match="has no key bias, but the model has one"):
        layouts["timm-eva"].from_ours(model.state_dict(), model.config)


def test_tap_sees_branches() -> None:
    model = effformer.build_model("vit-nano")
    tap = Tap(keep=("blocks.1.*", "head.*"))
    model(model.example_inputs(2)["x"], tap=tap)
    assert tap.seen["blocks.1.attn.q"].shape == (2, 2, 17, 24)
    assert tap.seen["blocks.1.ffn"].shape == (2, 17, 48)


def test_grouped_queries_equal_repeated_keys() -> None:
    from effformer.site import Site

    site = Site(dim=24, heads=4)
    grouped, full = (Attention(Attention.Config(kv_heads=n), site) for n in (2, None))
    with torch.no_grad():
        for kind in ("weight", "bias"):
            q, k, v = getattr(grouped.qkv, kind).split([24, 12, 12])
            k, v = (x.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v))
            getattr(full.qkv, kind).copy_(torch.cat([q, k, v]))
        full.proj.load_state_dict(grouped.proj.state_dict())
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(full(x), grouped(x))
    assert grouped.macs(5) == 5 * 24 * (24 + 12 + 12 + 24) + 2 * 24 * 25


def test_an_unknown_name_of_timm_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"unknown model of timm 'vit_tiny_patch16_242'; did you mean"
    ):
        vit_config_from_timm("vit_tiny_patch16_242")
