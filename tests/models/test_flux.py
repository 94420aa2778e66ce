"""FLUX: what it computes, and that everything of the library reaches both kinds of its blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import optimize, quantize
from effformer.export import export_onnx
from effformer.models import Flux
from torch import Tensor
from torch.nn import functional as F

import effformer
from effformer.blocks import Joint, Parallel
from effformer.checks import CapabilityError, FormatError
from effformer.context import Context, Ledger, Tap
from effformer.flow import TimeGrid, sample, shift_of_length, trained_of
from effformer.profile import profile
from effformer.train import Dataset, Generation, TrainConfig, train

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "schnell": {"guidance": False},
    "fill": {"condition_channels": 5},
    "layers": {"attn": "flow", "layers": {"0": {"ffn": "swiglu"}, "-1": {"attn": "softmax"}}},
    "dynamic": {"width": "dynamic", "layers": {"0": {"tokens": "dynamic"}}},
}


def awake(**options: Any) -> Flux:
    """A small model whose gates are open."""
    torch.manual_seed(0)
    model = effformer.build_model("flux-tiny", **options)
    with torch.no_grad():
        for path, p in model.named_parameters():
            noise = torch.randn_like(p)
            if ".gates." in path:  # some open, some closed
                p.copy_(noise)
            else:
                p.add_(noise * 0.1)
    assert isinstance(model, Flux)
    return model.eval()


def inputs(model: Flux, batch: int = 2) -> dict[str, Tensor]:
    return model.example_inputs(batch, generator=torch.Generator().manual_seed(0))


def test_it_starts_with_a_zero_velocity_and_blocks_that_do_nothing() -> None:
    model = effformer.build_model("flux-tiny").eval()
    tap = Tap(keep=("*",))
    assert not model(**inputs(model), tap=tap).any()
    assert [type(block) for block in model.blocks] == [Joint, Parallel, Parallel]
    h, y, ctx = torch.randn(2, 9, 32), torch.randn(2, 5, 32), Context(cond=torch.randn(2, 32))
    first, *others = model.blocks
    torch.testing.assert_close(first(h, y, ctx, ctx), (h, y), rtol=0, atol=0)
    for block in others:
        torch.testing.assert_close(block(h, ctx), h, rtol=0, atol=0)
    assert {"blocks.0.x.attn.q", "blocks.0.y.ffn", "blocks.1.attn.v", "blocks.2.ffn"} <= set(
        tap.seen
    )


def test_parts_of_published_sizes_are_chosen_by_name() -> None:
    with torch.device("meta"):
        model = effformer.build_model("flux-dev", attn="flow", layers={"3::4": {"attn": "softmax"}})
    cores = [(b.core if isinstance(b, Joint) else b.attn.part.core) for b in model.blocks]
    names = [core.config.entry.name for core in cores]
    assert names == (["flow"] * 3 + ["softmax"]) * 14 + ["flow"]
    assert [type(b) for b in model.blocks] == [Joint] * 19 + [Parallel] * 38
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_learns(options: dict[str, Any]) -> None:
    model = awake(**options).train()
    (model(**inputs(model)) * torch.randn(2, 4, 8, 8)).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@torch.no_grad()
def test_text_is_a_set_and_its_padding_may_be_masked_or_left_out() -> None:
    model = awake()
    given = inputs(model)
    out = model(**given)
    turned = given | {"text": given["text"][:, torch.randperm(6)]}
    torch.testing.assert_close(model(**turned), out, rtol=1e-4, atol=1e-5)
    padded = given | {"text": F.pad(given["text"], (0, 0, 0, 3), value=9.0)}
    mask = torch.arange(9).expand(2, -1) < torch.tensor([[6], [4]])
    alone = {k: v[1:] for k, v in given.items()} | {"text": given["text"][1:, :4]}
    expected = torch.cat([out[:1], model(**alone)])
    for packed in (False, True):
        same = model(**padded, text_mask=mask, packed=packed)
        torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(**padded), out)


@torch.no_grad()
def test_a_reference_is_seen_and_not_returned() -> None:
    model = awake()
    given, picture = inputs(model), torch.randn(2, 4, 6, 4)
    out = model(**given, reference=picture)
    assert out.shape == given["x"].shape
    assert not torch.allclose(out, model(**given))
    assert not torch.allclose(out, model(**given, reference=picture.flip(3)))
    mask = torch.ones(2, 6, dtype=torch.bool)
    packed = model(**given, reference=picture, text_mask=mask, packed=True)
    torch.testing.assert_close(packed, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"depth": 4, "doubles": 2},
    {"guidance": False, "condition_channels": 2, "dim": 72, "heads": 3, "rope": {"widths": (8, 8, 8)}},
])  # fmt: skip
@torch.no_grad()
def test_diffusers_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = awake(**options)
    layout = next(lay for lay in model.LAYOUTS if lay.name == "diffusers")
    said = {
        k: v[-1] if isinstance(v, tuple) else v for k, v in layout.options(model.config).items()
    }
    theirs = diffusers.FluxTransformer2DModel(
        **{k: v for k, v in said.items() if k[0] != "_"}
    ).eval()
    file = effformer.save_weights(model, tmp_path / "w.safetensors", layout)
    theirs.load_state_dict(effformer.io.read_weights(file))  # type: ignore[attr-defined]
    given = inputs(model)
    pictures = torch.cat([given["x"], *([given["condition"]] if "condition" in given else [])], 1)
    expected = theirs(
        F.pixel_unshuffle(pictures, 2).flatten(2).mT, given["text"], given["pooled"], given["t"],
        model.rope.positions((1, 4, 4))[0], torch.zeros(6, 3), given.get("guidance_scale"),
    ).sample  # fmt: skip
    out = F.pixel_unshuffle(model(**given), 2).flatten(2).mT
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = awake(**options)
    torch.nn.init.zeros_(again.final.linear.weight)
    report = effformer.load_weights(again, tmp_path / "theirs/diffusion_pytorch_model.safetensors")
    assert report.layout == "diffusers"
    assert {"num_layers", "axes_dims_rope", "guidance_embeds"} <= set(report.confirmed)
    torch.testing.assert_close(again(**given), model(**given), rtol=0, atol=0)


def test_checkpoints_of_others_are_named(tmp_path: Path) -> None:
    layout = Flux.LAYOUTS[1]
    file = effformer.save_weights(awake(guidance=False), tmp_path / "w.safetensors", layout)
    with pytest.raises(FormatError, match=r"missing: guidance_embed\.fc1"):
        effformer.load_weights(awake(), file)
    theirs = {"guidance_embeds": False, "num_single_layers": 2}
    with pytest.raises(FormatError, match="guidance_embeds is False there and True here"):
        effformer.load_weights(awake(), file, config=theirs)


def _pairs() -> Dataset:
    """Images that the text describes: a colour for every channel, in its first token."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(256, 4, generator=generator).clamp(-1, 1)
    text = torch.zeros(256, 2, 24)
    text[:, 0, :4] = colours
    images = colours[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    scale, pooled = torch.ones(256), torch.zeros(256, 16)
    tensors = {"x": images, "text": text, "pooled": pooled, "guidance_scale": scale}
    return Dataset(name="colours", tensors=tensors)


def test_it_learns_what_the_text_says_and_samples_it() -> None:
    torch.manual_seed(0)
    model = effformer.build_model("flux-tiny", input_size=4)
    data = _pairs()
    config = TrainConfig(steps=100, batch=64, warmup=10, lr=3e-3, ema=None)
    train(model, data, Generation(convention="flux"), config, progress=False)  # type: ignore[arg-type]
    record = trained_of(model)
    assert record is not None
    assert record.convention.data_at == 0
    held = data.rows(torch.arange(64))
    target = held.pop("x")
    grid = TimeGrid.uniform(4).shifted(shift_of_length(256))
    drawn = sample(model.eval(), torch.randn(64, 4, 4, 4), grid=grid, **held).x
    misled = (drawn.roll(1, 0) - target).square().mean()
    assert (drawn - target).square().mean() < 0.35 * target.var() < misled


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_exported_graphs_serve_other_sizes(options: dict[str, Any], tmp_path: Path) -> None:
    report = export_onnx(awake(**options), tmp_path / "model.onnx")
    assert report.parity is not None
    assert report.parity.passed
    sizes = {(c.shapes["x"][2], c.shapes["text"][1]) for c in report.parity.cases}
    assert len({image for image, _ in sizes}) > 1
    assert len({words for _, words in sizes}) > 1


@pytest.mark.slow
def test_exported_graphs_read_references_and_masks(tmp_path: Path) -> None:
    model = awake()
    mask = torch.arange(6).expand(2, -1) < torch.tensor([[6], [4]])
    given = inputs(model) | {"reference": torch.randn(2, 4, 6, 4), "text_mask": mask}
    report = export_onnx(model, tmp_path / "model.onnx", given)
    assert report.parity is not None
    assert report.parity.passed
    assert len({(c.shapes["x"][2], c.shapes["reference"][2]) for c in report.parity.cases}) > 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_saved_models_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = awake(**options)
    effformer.save_pretrained(model, tmp_path / "m")
    again = effformer.load_model(tmp_path / "m").eval()
    assert again.config == model.config
    torch.testing.assert_close(again(**inputs(model)), model(**inputs(model)), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"attn": "flow", "condition_channels": 5}])
def test_profiles_add_up(options: dict[str, Any]) -> None:
    model = awake(**options)
    found = profile(model, inputs(model, 1))
    first, *others = model.blocks
    assert not found.uncounted
    assert found.by_module["blocks"] == first.macs(16, 6) + sum(b.macs(22) for b in others)


@torch.no_grad()
def test_quantized_and_optimized_copies_agree() -> None:
    model = awake()
    given = inputs(model)
    out = model(**given)
    small, report = quantize(model, "int8", inputs=given)
    assert report.bytes_after < 0.5 * report.bytes_before
    torch.testing.assert_close(small(**given), out, rtol=0, atol=0.05 * float(out.abs().max()))
    torch.testing.assert_close(optimize(model)(**given), out, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dynamic_blocks_of_both_kinds_skip_what_they_report() -> None:
    model = awake(**OPTIONS["dynamic"])
    given, ledger = inputs(model), Ledger()
    given["t"] = torch.full((2,), 0.3)
    out = model(**given, ledger=ledger)
    torch.testing.assert_close(out, model(**given, tap=Tap()), rtol=1e-4, atol=1e-4)
    assert {"blocks.0.core", "blocks.0.x.attn", "blocks.1.attn", "blocks.2.ffn"} <= set(
        ledger.shares
    )
    assert min(float(s.fraction.min()) for s in ledger.shares.values()) < 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": torch.zeros(2, 3, 8, 8)}, r"x.*\(B, 4, H, W\)"),
        ({"x": torch.zeros(2, 4, 7, 8)}, r"\(7, 8\) is not divisible by patch 2"),
        ({"text": torch.zeros(2, 8, 7)}, r"text.*\(B, L, 24\)"),
        ({"pooled": None}, r"pooled text is missing; give pooled \(B, 16\)"),
        ({"pooled": torch.zeros(1, 16)}, "pooled"),
        ({"guidance_scale": None}, r"give guidance_scale \(B,\), such as 3\.5"),
        ({"guidance_scale": torch.ones(3)}, "guidance_scale"),
        ({"reference": torch.zeros(2, 4, 5, 4)}, r"reference: \(5, 4\) is not divisible"),
        ({"reference": torch.zeros(2, 3, 4, 4)}, "reference"),
        ({"packed": True}, "needs text_mask"),
        ({"text_mask": torch.ones(2, 5, dtype=torch.bool)}, "text_mask"),
    ],
)
def test_wrong_inputs_are_named(changes: dict[str, Any], match: str) -> None:
    model = awake()
    with pytest.raises(ValueError, match=f"flux-tiny: .*{match}"):
        model(**inputs(model) | changes)


def test_what_was_not_built_is_refused() -> None:
    model, filling = awake(), awake(condition_channels=5)
    with pytest.raises(CapabilityError, match="built without a condition"):
        model(**inputs(model), condition=torch.zeros(2, 5, 8, 8))
    with pytest.raises(CapabilityError, match="a reference has no condition beside it"):
        filling(**inputs(filling), reference=torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"condition is missing; give condition \(B, 5, H, W\)"):
        filling(**{k: v for k, v in inputs(filling).items() if k != "condition"})
    with pytest.raises(ValueError, match="of the size of x"):
        filling(**inputs(filling) | {"condition": torch.zeros(2, 5, 4, 4)})
    schnell = awake(guidance=False)
    given = inputs(schnell)
    same = schnell(**given, guidance_scale=torch.ones(2))
    torch.testing.assert_close(same, schnell(**given), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"attn": "longformer"}, CapabilityError, r"blocks\[0:1\]\.attn: .*; choices: .*flow"),
        ({"block": "adaln-zero"}, CapabilityError, "has one stream; choices: expert-adaln, joint"),
        ({"single": "joint"}, CapabilityError, r"blocks\[1:3\]\.block: .*; choices: .*parallel"),
        ({"tokens": "dynamic"}, CapabilityError, "run side by side"),
        ({"doubles": 4}, ValueError, "doubles=4 .* depth=3"),
        ({"dim": 48}, ValueError, r"widths \(4, 6, 6\) .* heads of width 24"),
        ({"input_size": 7}, ValueError, "not divisible by patch"),
    ],
)
def test_sizes_and_parts_that_do_not_fit_are_refused(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        effformer.build_model("flux-tiny", **options)
