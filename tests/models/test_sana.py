"""SANA: masks of the text, sizes, guidance, exchanged parts, layouts, export, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import export_onnx
from effformer.models import SANA

import effformer
from effformer.checks import CapabilityError, FormatError
from effformer.context import Tap
from effformer.flow import Guidance, adapt, guided, sample
from effformer.nn.norms import SharedModulation
from effformer.profile import profile

from .small import inputs, woken

NAMES = ("sana-nano", "sana-sprint-nano")


def awake(name: str = "sana-nano", **options: Any) -> SANA:
    """A small model with nothing at zero."""
    model = woken(name, **options)
    assert isinstance(model, SANA)
    return model


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_and_other_samples_are_not_seen(name: str) -> None:
    model = awake(name)
    given = inputs(model, 3)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 5:] = False
    out = model(**given, text_mask=mask)
    changed = given["text"].clone()
    changed[1, 5:] = 7.0
    torch.testing.assert_close(model(**{**given, "text": changed}, text_mask=mask), out)
    alone = {k: x[1:2] for k, x in given.items()}
    alone["text"] = alone["text"][:, :5]
    torch.testing.assert_close(model(**alone), out[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(**given)[1], out[1])


@torch.no_grad()
def test_a_patch_stands_where_the_convolution_finds_it() -> None:
    """No positions: without the convolution the tokens are a set."""
    model = awake(ffn="mlp")
    given = inputs(model, 1)
    order = torch.randperm(16 * 16, generator=torch.Generator().manual_seed(2))
    shuffled = given["x"].flatten(2)[..., order].view_as(given["x"])
    out = model(**given).flatten(2)[..., order].view_as(given["x"])
    torch.testing.assert_close(model(**{**given, "x": shuffled}), out, rtol=1e-4, atol=1e-5)
    whole = awake()
    before, after = whole(**given), whole(**{**given, "x": shuffled})
    assert not torch.allclose(before.flatten(2)[..., order].view_as(after), after, atol=1e-2)


@torch.no_grad()
def test_blocks_share_their_modulation() -> None:
    """With equal tables and weights all blocks do the same."""
    model = awake()
    first = model.blocks[0].state_dict()
    model.blocks[1].load_state_dict(first)
    assert all(b.modulation.own is None for b in model.blocks)
    tap = Tap(keep=("blocks.*",))
    model(**inputs(model), tap=tap)
    assert set(tap.seen) >= {"blocks.0.attn", "blocks.0.cross", "blocks.1.ffn"}
    table = model.blocks[0].modulation.table
    assert isinstance(model.blocks[0].modulation, SharedModulation)
    assert table.shape == (6, model.config.dim)


def test_every_parameter_learns() -> None:
    for name in NAMES:
        model = awake(name).train()
        model(**inputs(model)).square().sum().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_work_grows_with_the_tokens() -> None:
    model = awake()
    small, large = (
        profile(model, inputs(model, 1, x=torch.randn(1, 4, side, side)), memory=False).total
        for side in (16, 32)
    )
    assert large < 4.01 * small


@torch.no_grad()
def test_guided_samples_of_a_text() -> None:
    model = awake()
    field, x = adapt(model), torch.randn(2, 4, 8, 12)
    cond = {"text": torch.randn(2, 8, 32)}
    torch.testing.assert_close(field(x, 0.25, **cond), -model(x, torch.full((2,), 750.0), **cond))
    null = {"text": torch.zeros(2, 8, 32)}
    u, v = field(x, 0.25, **null), field(x, 0.25, **cond)
    found = guided(field, 4.5, null={"text": 0})(x, 0.25, **cond)
    torch.testing.assert_close(found, u + 4.5 * (v - u), rtol=1e-4, atol=1e-4)
    out = sample(field, x, steps=2, guidance=Guidance(4.5, {"text": 0}), **cond).x
    assert out.shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_published_files_come_back(name: str, tmp_path: Path) -> None:
    model, other = awake(name), effformer.build_model(name).eval()
    given = inputs(model)
    expected = model(**given)
    again = effformer.load_model(effformer.save_pretrained(model, tmp_path / "m"))
    torch.testing.assert_close(again(**given), expected, rtol=0, atol=0)
    effformer.load_weights(other, model.LAYOUTS[0].from_ours(model.state_dict(), model.config))
    torch.testing.assert_close(other(**given), expected, rtol=0, atol=0)


def test_a_checkpoint_of_the_sibling_is_refused() -> None:
    sprint = awake("sana-sprint-nano")
    published = sprint.LAYOUTS[0].from_ours(sprint.state_dict(), sprint.config)
    with pytest.raises(FormatError, match=r"unexpected: .*norm"):
        effformer.load_weights(awake(), published)
    heads = awake(cross={"heads": 4, "head_dim": 16})
    plain = awake()
    state = plain.LAYOUTS[0].from_ours(plain.state_dict(), plain.config)
    with pytest.raises(FormatError, match="num_cross_attention_heads is 2 there and 4 here"):
        effformer.load_weights(heads, state, config={"num_cross_attention_heads": 2})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_exports_for_other_sizes_and_texts(name: str, tmp_path: Path) -> None:
    report = export_onnx(awake(name, depth=1), tmp_path / "m.onnx")
    assert report.parity is not None
    assert report.parity.passed
    sizes = {(c.shapes["x"][2], c.shapes["text"][1]) for c in report.parity.cases}
    assert len({side for side, _ in sizes}) > 1
    assert len({words for _, words in sizes}) > 1


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("sana-sprint-nano", {"guidance_scale": None}, ValueError, "scale of guidance is missing"),
        ("sana-nano", {"guidance_scale": torch.ones(2)}, ValueError, "is not told the scale"),
        ("sana-sprint-nano", {"guidance_scale": torch.ones(3)}, ValueError, r"expected shape \(B,\)"),
        ("sana-nano", {"text": torch.ones(2, 8, 31)}, ValueError, r"text: expected .* 32\)"),
        ("sana-nano", {"text_mask": torch.ones(2, 8)}, TypeError, "text_mask"),
        ("sana-nano", {"x": torch.ones(2, 3, 8, 8)}, ValueError, r"x: expected .* 4, H, W\)"),
    ],
)  # fmt: skip
def test_bad_input(
    name: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = effformer.build_model(name)
    given = {k: x for k, x in inputs(model, 2, **changes).items() if x is not None}
    with pytest.raises(error, match=message):
        model(**given)


def test_a_mixer_over_the_text_that_cannot_mask_says_so() -> None:
    able = {e.name for e in effformer.registry.attention if e.caps.cross and e.caps.mask == "none"}
    for name in able:
        model = effformer.build_model("sana-nano", cross=name)
        with pytest.raises(CapabilityError, match="mask"):
            model(**inputs(model), text_mask=torch.ones(2, 8, dtype=torch.bool))
