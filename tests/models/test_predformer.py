"""PredFormer: published sizes, independence along axes, layouts, rollout, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import Session, export_onnx
from effformer.models.predformer import PRESETS
from torch import Tensor, nn

import effformer
from effformer.checks import CapabilityError, FormatError
from effformer.context import Context
from effformer.profile import profile

SMALL: dict[str, Any] = {
    "dim": 24, "heads": 3, "frames": 4, "channels": 2, "size": (16, 24), "patch": 8,
}  # fmt: skip
VARIANTS = {
    "full": ("f", 2), "facst": ("sstt", 2), "facts": ("ttss", 2), "binst": ("st", 1),
    "bints": ("ts", 1), "tst": ("tst", 1), "sts": ("sts", 1), "tsst": ("tsst", 1),
    "stts": ("stts", 1), "bints, deep": ("ttss", 2),
}  # fmt: skip


def awake(axes: str = "tsst", unit: int = 1, **options: Any) -> Any:
    """A small model with weights of any size."""
    depth = options.pop("depth", max(2, unit) if len(axes) == 1 else len(axes))
    changes = {"axes": axes, "depth": depth, "block": {"unit": unit}, **SMALL, **options}
    model = effformer.build_model("predformer-tiny", **changes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.dim() == 1))
    return model


def clip(batch: int = 2, frames: int = 4, size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.rand(batch, frames, 2, *size)


@pytest.mark.parametrize("name", [n for n in PRESETS if PRESETS[n].params])
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].params


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("mnist-full", 25.286), ("mnist-facst", 25.286), ("mnist-facts", 25.286),
        ("mnist-bints", 25.298), ("mnist-tst", 25.298), ("mnist-tsst", 25.298),
        ("taxibj-full", 8.435), ("taxibj-facts", 8.435), ("taxibj-tsst", 8.439),
        ("taxibj-sts", 6.333), ("weather-full", 5.273), ("weather-facts", 5.273),
        ("weather-tsst", 5.276), ("human-full", 12.726), ("human-facts", 12.726),
        ("human-tst", 12.731), ("human-tsst", 12.731),
    ],
)  # fmt: skip
def test_published_parameter_counts(name: str, millions: float) -> None:
    params = PRESETS[f"predformer-{name}"].params
    assert params is not None
    assert abs(params / 1e6 - millions) < 0.0006


@pytest.mark.parametrize(
    ("name", "giga"),
    [
        ("mnist-full", 21.20), ("mnist-facts", 16.46), ("mnist-tsst", 16.478),
        ("mnist-sts", 16.549), ("taxibj-full", 2.426), ("taxibj-facts", 2.194),
        ("taxibj-tsst", 2.196), ("taxibj-sts", 1.656), ("weather-facts", 8.544),
        ("weather-tsst", 8.555),
    ],
)  # fmt: skip
def test_published_costs(name: str, giga: float) -> None:
    """The published numbers count five multiply-adds per channel of a norm."""
    with torch.device("meta"):
        model = effformer.build_model(f"predformer-{name}")
    x = torch.empty(1, model.config.frames, model.config.channels, *model.config.size).to("meta")
    report = profile(model, {"x": x})
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    frames, rows, columns = model.config.grid
    extra = 5 * frames * rows * columns * model.config.dim * len(norms)
    assert (report.total + extra) / 1e9 == pytest.approx(giga, rel=0.002)


def test_factorized_attention_grows_with_both_axes() -> None:
    def attention(axes: str, frames: int, size: tuple[int, int]) -> int:
        model = awake(axes, frames=frames, size=size)
        by_op = profile(model, {"x": clip(1, frames, size)}).by_op
        return sum(count for op, count in by_op.items() if "attention" in op)

    for frames, size in [(4, (16, 24)), (8, (16, 24)), (4, (32, 48))]:
        cells = size[0] * size[1] // 64
        t, n = frames, cells
        assert attention("f", t, size) == 2 * 2 * (t * n) ** 2 * 24
        assert attention("ts", t, size) == 2 * 24 * (t * t * n + t * n * n)


def test_time_units_keep_places_apart_and_space_units_frames() -> None:
    grid, x = (4, 2, 3), torch.randn(2, 24, 24)
    for axes, place in (("t", (slice(None), 1, 2)), ("s", (2,))):
        block = awake(axes, depth=1).blocks[0]
        out = block(x, Context(grid=grid)).unflatten(1, grid)
        changed = x.unflatten(1, grid).clone()
        changed[(slice(None), *place)] += 1
        after = block(changed.flatten(1, 3), Context(grid=grid)).unflatten(1, grid)
        touched = torch.zeros(grid, dtype=torch.bool)
        touched[place] = True
        torch.testing.assert_close(after[:, ~touched], out[:, ~touched], rtol=0, atol=1e-5)
        assert not torch.allclose(after[:, touched], out[:, touched])


def test_every_frame_sees_every_frame_and_samples_stay_apart() -> None:
    model, x = awake(), clip(3)
    whole = model(x)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1]), whole[i : i + 1], rtol=1e-4, atol=1e-5)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[0].square().sum(), x)
    assert grad[0].abs().gt(0).float().mean() > 0.99
    assert not grad[1:].any()


def test_units_end_with_a_norm() -> None:
    model = awake("ttss", 2)
    ends = [isinstance(block.norm, nn.LayerNorm) for block in model.blocks]
    assert ends == [False, True, False, True]
    with torch.no_grad():
        model.blocks[-1].norm.weight.fill_(1)
        model.blocks[-1].norm.bias.zero_()
    h = model.encode(model.embed(clip()), Context(grid=(4, 2, 3)))
    torch.testing.assert_close(h.mean(-1), torch.zeros(2, 24), rtol=0, atol=1e-5)
    torch.testing.assert_close(h.var(-1, correction=0), torch.ones(2, 24), rtol=0, atol=1e-3)


def test_patches_go_in_and_out_as_images() -> None:
    """Without blocks, and with a head that inverts the embedding, frames come out as they went
    in."""
    model = awake(dim=128, heads=2)
    model.blocks, model.norm = nn.ModuleList(), nn.Identity()
    with torch.no_grad():
        weight = torch.linalg.qr(torch.randn(128, 128)).Q
        model.patch_embed.proj.weight.copy_(weight.reshape(128, 8, 8, 2).permute(0, 3, 1, 2))
        model.patch_embed.proj.bias.zero_()
        model.positions.zero_()
        model.head.weight.copy_(weight.T)
        model.head.bias.zero_()
    x = clip()
    torch.testing.assert_close(model(x), x, rtol=0, atol=1e-4)


def test_position_table() -> None:
    table = awake().positions.double()
    for k in range(24):
        for i in range(24):
            angle = torch.tensor(k / 10000 ** (2 * (i // 2) / 24), dtype=torch.float64)
            expected = angle.cos() if i % 2 else angle.sin()
            assert abs(table[k, i] - expected) < 1e-6


@pytest.mark.slow
def test_a_changed_table_is_exported_and_not_the_formula(tmp_path: Path) -> None:
    model, x = awake(), clip()
    with torch.no_grad():
        model.positions.mul_(1.1)
    assert model.dynamic_axes() == {"x": {0: "batch"}}
    export_onnx(model, tmp_path / "m.onnx", verify=False)
    found = torch.from_numpy(Session(tmp_path / "m.onnx").run({"x": x})["output"])
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_other_sizes_have_their_own_positions() -> None:
    model, other = awake(), awake(frames=6, size=(8, 32))
    other.load_state_dict(model.state_dict())
    x = clip(1, 6, (8, 32))
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("frames", [1, 3, 4, 8, 11])
def test_longer_horizons_feed_predictions_back(frames: int) -> None:
    model, x = awake(), clip()
    first = model(x)
    second = model(first)
    expected = torch.cat([first, second, model(second)], dim=1)[:, :frames]
    torch.testing.assert_close(model.predict(x, frames), expected)


def test_transposed_head_reads_space_as_time() -> None:
    right, wrong = awake("sstt", 2), awake("sstt", 2, transposed_head=True)
    wrong.load_state_dict(right.state_dict())
    ctx, h = Context(grid=(4, 2, 3)), right.embed(clip())
    tokens = right.encode(h, ctx)
    for t in range(4):
        for n in range(6):
            place = n * 4 + t
            torch.testing.assert_close(wrong.encode(h, ctx)[:, place], tokens[:, t * 6 + n])


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_layouts_lose_nothing(variant: str, tmp_path: Path) -> None:
    axes, unit = VARIANTS[variant]
    model, again, x = awake(axes, unit), awake(axes, unit), clip()
    layout = "official-factorized" if "fac" in variant else "official"
    file = effformer.save_weights(model, tmp_path / "w.safetensors", layout)
    report = effformer.load_weights(again, file)
    assert report.layout == layout
    assert (report.missing, report.unexpected) == ((), ())
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_official_keys_are_those_of_the_code() -> None:
    names = {
        "tsst": ["ts_temporal", "ts_space", "st_space", "st_temporal"],
        "stts": ["st_space", "st_temporal", "ts_temporal", "ts_space"],
    }
    for axes, order in names.items():
        model = awake(axes, depth=8)
        state = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
        for i, unit in enumerate(order * 2):
            key = f"blocks.{i // 4}.{unit}_transformer"
            assert torch.equal(state[f"{key}.norm.weight"], model.blocks[i].norm.weight)
            assert torch.equal(
                state[f"{key}.layers.0.0.fn.to_qkv.weight"],
                model.blocks[i].attn.part.mixer.qkv.weight,
            )
    head, weight = state["mlp_head.1.weight"], state["to_patch_embedding.1.weight"]
    c, row, column = 1, 3, 5
    assert torch.equal(
        head[c * 64 + row * 8 + column], model.head.weight[(row * 8 + column) * 2 + c]
    )
    ours = model.patch_embed.proj.weight[:, c, row, column]
    assert torch.equal(weight[:, (row * 8 + column) * 2 + c], ours)


def test_two_units_are_written_in_both_ways(tmp_path: Path) -> None:
    model, again, x = awake("ts"), awake("ts"), clip()
    for layout in ("official", "official-factorized"):
        file = effformer.save_weights(model, tmp_path / f"{layout}.safetensors", layout)
        assert effformer.load_weights(again, file).layout == layout
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("axes", "options", "layout", "message"),
    [
        ("tts", {"depth": 3}, "official", "none of the published arrangements"),
        ("tsst", {}, "official-factorized", "one unit over space and one over time"),
        ("ts", {"transposed_head": True}, "official", "use layout 'official-factorized'"),
        ("ts", {"block": {"unit": 2}}, "official", "have no official name"),
        ("ts", {"block": "prenorm"}, "official", "has no block='prenorm'"),
    ],
)
def test_what_has_no_official_form_is_refused(
    axes: str, options: dict[str, Any], layout: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        effformer.save_weights(awake(axes, **options), tmp_path / "w.safetensors", layout)


@pytest.mark.parametrize(
    "options",
    [
        {"attn": "flow"}, {"ffn": "mlp"}, {"block": "macaron"}, {"axes": "thwf"},
        {"attn": {"name": "linformer", "projected": 2}},
        {"layers": {"1:3": {"attn": "linear"}, "0": {"attn": "relative"}}, "axes": "ssst"},
        {"attn": "factorized-parallel", "axes": "f"},
    ],
)  # fmt: skip
def test_any_part_in_a_unit(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = awake(**options), clip()
    out = model(x)
    assert out.shape == x.shape
    assert out.isfinite().all()
    effformer.save_pretrained(model, tmp_path / "m")
    loaded = effformer.load_model(tmp_path / "m")
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(x), out, rtol=0, atol=0)


def test_swapped_mixers_keep_their_axes_and_projections() -> None:
    model = awake(attn="flow")
    for block, over in zip(model.blocks, ("t", "hw", "hw", "t"), strict=True):
        mixer = block.attn.part
        assert mixer.config.over == over
        assert type(mixer.mixer.core).__name__ == "Flow"
        assert mixer.mixer.qkv.bias is None
    assert awake("f", attn="flow").blocks[0].attn.part.qkv.bias is None


def test_dropout_rates() -> None:
    model = awake(dropout=0.1, attn_dropout=0.3, drop_path=0.2)
    for block in model.blocks:
        assert block.attn.part.mixer.drop.p == 0.3
        assert block.ffn.part.drop.p == 0.1
        assert block.attn.drop_path.p == block.ffn.drop_path.p == 0.2
    assert awake(dropout=0.1).blocks[0].attn.part.mixer.drop.p == 0.1


def test_every_parameter_learns() -> None:
    model = awake().train()
    model(clip()).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.slow
def test_exports_for_other_sizes(tmp_path: Path) -> None:
    model = awake("ts")
    report = export_onnx(
        model, tmp_path / "m.onnx", model.example_inputs(2), dynamic=model.dynamic_axes()
    )
    assert report.parity is not None
    assert report.parity.passed
    shapes = [case.shapes["x"] for case in report.parity.cases]
    assert len({shape[1] for shape in shapes}) > 1
    assert any(shape[0] == 1 for shape in shapes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": (16, 20)}, ValueError, r"size \(16, 20\) is not divisible by patch 8"),
        ({"frames": 0}, ValueError, "frames must be at least 1, got 0"),
        ({"dim": 25, "heads": 5}, ValueError, "dim must be even"),
        ({"attn_dropout": 1.0}, ValueError, r"attn_dropout must lie in \[0, 1\)"),
        ({"axes": "tsx"}, ValueError, "'x' in 'tsx' is no axis"),
        ({"axes": "tss"}, ValueError, "the 3 letters of 'tss' do not divide 4 blocks"),
        ({"block": {"unit": 0}}, ValueError, "unit must be at least 1"),
        (
            {"attn": "relative"},
            CapabilityError,
            r"blocks\[0:1\]\.attn: 'relative' needs a token grid with axes h, w, and here it has w",
        ),
        ({"block": "adaln-zero"}, CapabilityError, "needs a conditioning vector"),
        ({"attn": {"name": "flow", "causal": True}}, CapabilityError, "attends both ways"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        effformer.build_model("predformer-tiny", **options)


def test_bad_inputs() -> None:
    model = awake()
    with pytest.raises(ValueError, match=r"x: expected shape \(B, T, 2, H, W\), got \(1, 4, 3, 8"):
        model(torch.zeros(1, 4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(8, 12\) is not divisible by patch 8"):
        model(torch.zeros(1, 4, 2, 8, 12))
    with pytest.raises(ValueError, match="predict: frames must be at least 1, got 0"):
        model.predict(clip(), 0)


def test_one_whole_head_needs_no_output_projection(tmp_path: Path) -> None:
    """The official code leaves it out where a single head is as wide as the tokens."""
    options: dict[str, Any] = {"heads": 1, "attn": {"head_dim": 24, "proj": False}}
    model, again, x = awake("ts", **options), awake("ts", **options), clip()
    file = effformer.save_weights(model, tmp_path / "w.safetensors", "official")
    assert not [key for key in effformer.io.read_weights(file) if "to_out" in key]
    effformer.load_weights(again, file)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
