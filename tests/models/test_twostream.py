"""A small two-stream model: what it computes, and that everything of the library reaches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import (
    acmize,
    gate_tables,
    optimize,
    prepare_widths,
    quantize,
    sort_by_magnitude,
)
from effformer.export import export_onnx
from effformer.models import JointDiT
from torch import Tensor, nn

import effformer
from effformer import registry
from effformer.attention import Attention
from effformer.blocks import Joint
from effformer.checks import CapabilityError
from effformer.context import Context, Ledger, Tap
from effformer.profile import profile
from effformer.train import Dataset, Generation, TrainConfig, train

CORES = registry.core.names(order_free=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rope": {}, "attn": {"qk_norm": True}},
    "flux": {"rope": {"temperature": 1e4}, "block": {"name": "joint", "ends": False}},
    "layers": {"layers": {"0": {"attn": "flow", "ffn": "swiglu"}}},
    "dynamic": {"width": "dynamic", "tokens": "dynamic"},
    "acm": {"ffn": "acm", "attn": {"projections": {}}},
    "bare": {"pooled_dim": None, "ffn": None},
}
LONG = ("acm", "layers", "flux", "plain", "dynamic", "rotary")
"""Exports of many seconds, in the slow tier."""


def awake(*, name: str = "joint-dit-nano", **options: Any) -> JointDiT:
    """A small model whose gates are open."""
    torch.manual_seed(0)
    model = effformer.build_model(name, **{"input_size": 8, **options})
    with torch.no_grad():
        for path, p in model.named_parameters():
            noise = torch.randn_like(p)
            if ".gates." in path:  # some open, some closed
                p.copy_(noise)
            else:
                p.add_(noise * 0.1)
    assert isinstance(model, JointDiT)
    return model.eval()


def inputs(model: JointDiT, batch: int = 2) -> dict[str, Tensor]:
    return model.example_inputs(batch, generator=torch.Generator().manual_seed(0))


def test_it_starts_with_a_zero_velocity_and_blocks_that_do_nothing() -> None:
    model = effformer.build_model("joint-dit-nano").eval()
    tap = Tap(keep=("*",))
    given = inputs(model)
    assert not model(**given, tap=tap).any()
    h, y = torch.randn(2, 9, 48), torch.randn(2, 5, 48)
    ctx = Context(cond=torch.randn(2, 48), time=torch.randn(2, 48))
    for block in model.blocks:
        torch.testing.assert_close(block(h, y, ctx, ctx), (h, y), rtol=0, atol=0)
    assert {"blocks.0.x.attn.q", "blocks.1.y.attn.v", "blocks.0.y.ffn"} <= set(tap.seen)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_learns(options: dict[str, Any]) -> None:
    model = awake(**options).train()
    (model(**inputs(model)) * torch.randn(2, 4, 8, 8)).sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # nobody reads the text behind the last block, so its last queries mean nothing to a softmax
    unread = f"blocks.{model.config.depth - 1}.y."
    assert all(name.startswith(unread) for name in silent)
    if model.blocks[-1].ends:
        assert all(".q." in name or "q_norm" in name for name in silent)


def test_text_is_a_set_and_its_padding_means_nothing() -> None:
    model = awake(rope={})
    given = inputs(model)
    out = model(**given)
    order = torch.randperm(given["text"].shape[1])
    again = model(**given | {"text": given["text"][:, order]})
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)
    padded = torch.cat([given["text"], torch.full((2, 3, 32), 9.0)], dim=1)
    mask = torch.arange(padded.shape[1]).expand(2, -1) < given["text"].shape[1]
    same = model(**given | {"text": padded}, text_mask=mask)
    torch.testing.assert_close(same, out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(**given | {"text": padded}), out)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("options", [{}, {"rope": {}}], ids=["sincos", "rotary"])
@torch.no_grad()
def test_every_order_free_core_runs_masked_and_packed(core: str, options: dict[str, Any]) -> None:
    model = awake(attn=core, **options)
    assert isinstance(model.config.attn, Attention.Config)
    given = inputs(model, 3)
    mask = torch.arange(8) < torch.tensor([5, 8, 1])[:, None]
    out = model(**given, text_mask=mask)
    assert out.isfinite().all()
    packed = model(**given, text_mask=mask, packed=True)
    torch.testing.assert_close(packed, out, rtol=1e-4, atol=1e-4 * float(out.abs().max()))
    for i, n in enumerate([5, 8, 1]):
        one = {k: v[i : i + 1] for k, v in given.items()}
        alone = model(**one | {"text": one["text"][:, :n]})
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attn", ["lmu", "longformer", "reformer", "tdsm"])
def test_mixers_that_know_an_order_are_refused_with_choices(attn: str) -> None:
    with pytest.raises(CapabilityError, match=r"attn: .*; choices: .*flow.*softmax"):
        effformer.build_model("joint-dit-nano", attn=attn)
    with pytest.raises(CapabilityError, match=r"has one stream; choices: expert-adaln, joint"):
        effformer.build_model("joint-dit-nano", block="adaln-zero")


def _pairs() -> Dataset:
    """Images that the text describes: a colour for every channel, in its first token."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(256, 4, generator=generator).clamp(-1, 1)
    text = torch.zeros(256, 2, 4)
    text[:, 0] = colours
    images = colours[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    return Dataset(name="colours", tensors={"x": images, "text": text})


def test_it_learns_what_the_text_says() -> None:
    torch.manual_seed(0)
    model = effformer.build_model(
        "joint-dit-nano", input_size=4, text_dim=4, text_length=2, pooled_dim=None
    )
    data = _pairs()
    config = TrainConfig(steps=150, batch=64, warmup=10, lr=3e-3, ema=None)
    train(model, data, Generation(), config, progress=False)
    model.eval()
    held, noise = data.rows(torch.arange(64)), torch.randn(64, 4, 4, 4)
    target = held["x"] - noise  # at t = 0 only the text tells the image
    start = torch.zeros(64)
    told = (model(noise, start, held["text"]) - target).square().mean()
    misled = (model(noise, start, held["text"].roll(1, 0)) - target).square().mean()
    silent = held["x"].var()
    assert told < 0.35 * silent < misled


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.slow] if name in LONG else [])
        for name, options in OPTIONS.items()
    ],
)
def test_exported_graphs_serve_other_sizes(options: dict[str, Any], tmp_path: Path) -> None:
    report = export_onnx(awake(**options), tmp_path / "model.onnx")
    assert report.parity is not None
    assert report.parity.passed
    sizes = {(c.shapes["x"][2], c.shapes["text"][1]) for c in report.parity.cases}
    assert len({image for image, _ in sizes}) > 1
    assert len({words for _, words in sizes}) > 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_saved_models_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = awake(**options)
    effformer.save_pretrained(model, tmp_path / "m")
    again = effformer.load_model(tmp_path / "m").eval()
    assert again.config == model.config
    torch.testing.assert_close(again(**inputs(model)), model(**inputs(model)), rtol=0, atol=0)


def test_profiles_add_up() -> None:
    model = awake()
    found = profile(model, inputs(model, 1))
    blocks = sum(block.macs(16, 8) for block in model.blocks)
    ends = {"patch embedding", "time MLP", "modulation (final)", "final linear", "other"}
    others = sum(macs for name, macs in found.by_part.items() if str(name) not in ends)
    assert not found.uncounted
    assert found.by_module["blocks"] == blocks
    assert others >= 0


@torch.no_grad()
def test_quantized_and_optimized_copies_agree() -> None:
    model = awake()
    given = inputs(model)
    out = model(**given)
    small, report = quantize(model, "int8", inputs=given)
    assert report.bytes_after < 0.5 * report.bytes_before
    torch.testing.assert_close(small(**given), out, rtol=0, atol=0.05 * float(out.abs().max()))
    torch.testing.assert_close(optimize(model)(**given), out, rtol=1e-4, atol=1e-4)


def test_dynamic_models_skip_what_they_report() -> None:
    model = awake(**OPTIONS["dynamic"])
    given, ledger = inputs(model), Ledger()
    given["t"] = torch.full((2,), 0.3)
    out = model(**given, ledger=ledger)
    torch.testing.assert_close(out, model(**given, tap=Tap()), rtol=1e-4, atol=1e-4)
    assert {"blocks.0.core", "blocks.0.x.attn", "blocks.1.y.attn"} <= set(ledger.shares)
    assert min(float(s.fraction.min()) for s in ledger.shares.values()) < 1
    found = profile(model, given)
    assert found.executed < found.total
    table = prepare_widths(model, torch.tensor([0.1, 0.3]))
    assert "blocks.0.x.attn" in table.active
    torch.testing.assert_close(model(**given), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(optimize(model)(**given), out, rtol=1e-4, atol=1e-4)
    assert gate_tables(model, torch.tensor([0.3])).fraction().shape == (1,)


def test_heads_are_sorted_in_both_streams_together() -> None:
    model = awake()
    out = model(**inputs(model))
    sort_by_magnitude(model)
    for block in model.blocks:
        assert isinstance(block, Joint)
        assert (block.magnitudes().diff() <= 0).all()
    torch.testing.assert_close(model(**inputs(model)), out, rtol=1e-4, atol=1e-4)


def test_pruned_heads_are_silent_heads() -> None:
    model = awake(name="joint-dit-tiny", rope={}, attn="flow")
    silenced, keep = inputs(model), torch.tensor([0, 2])
    for block in model.blocks:
        for stream in (block.x, block.y):
            if stream.attn.part.closes:
                with torch.no_grad():
                    stream.attn.part.proj.weight.unflatten(1, (3, -1))[:, 1] = 0
    out = model(**silenced)
    model.blocks = nn.ModuleList(block.select(keep) for block in model.blocks)
    torch.testing.assert_close(model(**silenced), out, rtol=1e-4, atol=1e-4)


def test_adaptive_modules_stand_in_both_streams() -> None:
    student, report = acmize(awake())
    assert "blocks.0.x.ffn.part.learners" in report.places
    assert "blocks.0.y.attn.part.qkv" not in report.places
    assert {"blocks.0.y.attn.part.k", "blocks.1.y.attn.part.v"} <= set(report.places)
    ledger = Ledger()
    assert student(**inputs(student), ledger=ledger).isfinite().all()
    assert {"blocks.0.y.ffn", "blocks.0.y.attn"} <= set(ledger.executed)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text": torch.zeros(2, 8, 7)}, "text"),
        ({"pooled": torch.zeros(1, 32)}, "pooled"),
        ({"x": torch.zeros(2, 4, 7, 8)}, "not divisible by patch"),
        ({"packed": True}, "needs text_mask"),
        ({"text_mask": torch.ones(2, 5, dtype=torch.bool)}, "text_mask"),
    ],
)
def test_wrong_inputs_are_named(changes: dict[str, Any], match: str) -> None:
    model = awake()
    with pytest.raises(ValueError, match=match):
        model(**inputs(model) | changes)


def test_a_mask_of_numbers_is_named() -> None:
    model = awake()
    with pytest.raises(TypeError, match=r"^\S+: text_mask: expected bool, True = may attend, got"):
        model(**inputs(model), text_mask=torch.ones(2, 8))


def test_what_was_not_built_is_refused() -> None:
    bare = awake(pooled_dim=None)
    with pytest.raises(CapabilityError, match="pooled_dim is None"):
        bare(**inputs(bare), pooled=torch.zeros(2, 32))
    with pytest.raises(ValueError, match="differs by layer"):
        awake(rope={"kind": "mixed"})
