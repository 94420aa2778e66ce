from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.models import LightningDiT, SiT
from effformer.models.lightningdit import PRESETS
from torch import Tensor

import effformer
from effformer.checks import CapabilityError, FormatError
from effformer.context import Rope
from effformer.nn.norms import modulate

SMALL = {"num_classes": 10}
WITHOUT_SHIFT = {"name": "adaln-zero", "shift": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "plain": {"ffn": "mlp", "rope": None, "norm": "layer", "learn_sigma": True},
    "qk": {"attn": {"qk_norm": True}, "block": WITHOUT_SHIFT, "patch": 2},
    "qk-layer": {"attn": {"qk_norm": True, "qk_norm_eps": 1e-5}, "norm": "layer"},
}


def awake(**options: Any) -> LightningDiT:
    """A small model whose gates are open."""
    model = effformer.build_model("lightningdit-nano", **{**SMALL, **options}).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    assert isinstance(model, LightningDiT)
    return model


@pytest.mark.parametrize(
    ("name", "millions"), [("LightningDiT-XL/1", 675), ("lightningdit-1p0b", 1000)]
)
def test_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count / millions - 1) < 0.03
    assert PRESETS[model.name].config == model.config


def test_swiglu_has_the_published_width() -> None:
    for preset in PRESETS.values():
        dim = preset.config.dim
        assert preset.config.ffn.width(dim) == int(2 / 3 * int(4.0 * dim))


def _turned(x: Tensor, y: float, row: int, column: int) -> Tensor:
    """One head, pair by pair: the first half of the pairs turns with the row."""
    out = x.clone()
    pairs = x.shape[0] // 2
    for i in range(pairs):
        quarter = pairs // 2
        place = row if i < quarter else column
        angle = torch.tensor(place * y ** (-(i % quarter) / quarter), dtype=x.dtype)
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i] = a * angle.cos() - b * angle.sin()
        out[2 * i + 1] = b * angle.cos() + a * angle.sin()
    return out


def test_rotary_positions_are_those_of_the_equation() -> None:
    model = awake()
    (table,) = model.rope(model.rope.positions((3, 2)), like=torch.empty(0))
    q = torch.randn(1, 1, 6, 24)
    turned = table.query(q)
    for n in range(6):
        slow = _turned(q[0, 0, n], 10000.0, n // 2, n % 2)
        torch.testing.assert_close(turned[0, 0, n], slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_block_is_the_equation(options: dict[str, Any]) -> None:
    model = awake(**options).double()
    given = model.example_inputs(2)
    ctx, h = model.context(**given), model.embed(given["x"])
    assert ctx.cond is not None
    block = model.blocks[0]
    linear = block.modulation.linear
    mods = (torch.nn.functional.silu(ctx.cond) @ linear.weight.T + linear.bias)[:, None]
    shifted = options.get("block") != WITHOUT_SHIFT
    mods = mods.chunk(6 if shifted else 4, dim=-1)
    zero = torch.zeros(2, 1, 48, dtype=torch.float64)
    triples = [mods[:3], mods[3:]] if shifted else [(zero, *mods[:2]), (zero, *mods[2:])]
    x = h
    for branch, (shift, scale, gate) in zip((block.attn, block.ffn), triples, strict=True):
        assert sum(p.numel() for p in branch.norm.parameters()) == (
            0 if options.get("norm") == "layer" else 48
        )
        inner = modulate(branch.norm(x), shift, scale)
        x = x + gate * branch.part(inner, ctx)
    torch.testing.assert_close(block(h, ctx), x)


def test_starts_with_a_zero_velocity_and_every_parameter_learns() -> None:
    fresh = effformer.build_model("lightningdit-nano", **SMALL).eval()
    assert not fresh(**fresh.example_inputs(2)).any()
    model = awake(attn={"qk_norm": True}).train()
    model(**model.example_inputs(2)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent


def test_a_variance_is_thrown_away() -> None:
    model = awake(learn_sigma=True)
    assert model.out_channels == 8
    assert model(**model.example_inputs(1)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_official_layout_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    model = awake(**options)
    path = effformer.save_weights(model, tmp_path / "w.safetensors", "official")
    again = awake(**options)
    assert effformer.load_weights(again, path).layout == "official"
    given = model.example_inputs(2)
    torch.testing.assert_close(again(**given), model(**given), rtol=0, atol=0)
    official = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    assert ("blocks.0.mlp.w12.weight" in official) == (options.get("ffn") != "mlp")
    assert ("feat_rope.freqs_cos" in official) == ("rope" not in options)
    assert ("final_layer.norm_final.weight" in official) == (options.get("norm") != "layer")


def test_rotary_tables_of_another_grid_are_refused(tmp_path: Path) -> None:
    path = effformer.save_weights(awake(), tmp_path / "w.safetensors", "official")
    with pytest.raises(FormatError, match="not the rotary table of this model's grid"):
        effformer.load_weights(awake(input_size=12), path)


def test_saved_models_come_back(tmp_path: Path) -> None:
    model = awake(rope=None, **OPTIONS["qk"])
    effformer.save_pretrained(model, tmp_path / "m")
    again = effformer.load_model(tmp_path / "m").eval()
    assert type(again) is LightningDiT
    assert again.config == model.config
    given = model.example_inputs(2)
    torch.testing.assert_close(again(**given), model(**given), rtol=0, atol=0)
    assert not issubclass(LightningDiT, SiT)


def test_other_resolutions() -> None:
    model = awake()
    larger = awake(input_size=12)
    state = {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
    effformer.load_weights(larger, state, strict=False)
    given = larger.example_inputs(2)
    torch.testing.assert_close(model(**given), larger(**given))


def test_mixers_without_rotary_embedding_are_refused_with_choices() -> None:
    with pytest.raises(CapabilityError, match=r"cannot apply rotary embedding; choices: .*softmax"):
        effformer.build_model("lightningdit-nano", attn="gla")
    assert effformer.build_model("lightningdit-nano", attn="gla", rope=None)
    with pytest.raises(ValueError, match="kind 'mixed' differs by layer"):
        effformer.build_model("lightningdit-nano", rope={"kind": "mixed"})
    with pytest.raises(ValueError, match="unknown value 'batch'"):
        effformer.build_model("lightningdit-nano", norm="batch")


def test_tables_are_constant_tensors_of_the_input_type() -> None:
    model = awake().double()
    ctx = model.context(**model.example_inputs(1))
    assert isinstance(ctx.rope, Rope)
    assert ctx.rope.cos.dtype == torch.float64
    assert ctx.rope.cos.shape == (64, 24)
