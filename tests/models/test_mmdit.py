"""MMDiT: published sizes, diffusers' network, the position table, and that the library reaches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import acmize, optimize, prepare_widths, quantize, sort_by_magnitude
from effformer.export import export_onnx
from effformer.models import MMDiT
from effformer.models.mmdit import PRESETS
from torch import Tensor

import effformer
from effformer import registry
from effformer.checks import FormatError
from effformer.context import Context, Ledger, Tap
from effformer.flow import Guidance, TimeGrid, Weak, adapt, sample, trained_of
from effformer.profile import profile
from effformer.train import EMA, Dataset, Generation, TrainConfig, train

MIXED: dict[str, Any] = {"attn": "gated-delta", "layers": {"1::2": {"attn": "softmax"}}}
OPTIONS: dict[str, dict[str, Any]] = {
    "sd3.5-medium": {},
    "sd3": {"attn": {"qk_norm": False}, "block": {"name": "joint", "dual": 0}},
    "mixed": MIXED,
    "dynamic": {"width": "dynamic", "tokens": "dynamic"},
}
SHORT: dict[str, Any] = {"depth": 1, "ffn": None, "block": {"name": "joint", "dual": 0}}
"""The least that has a position table and a text."""
CORES = [
    e.name for e in registry.core if e.caps.order_free or e.caps.causal != "never"
]  # fmt: skip


def awake(**options: Any) -> MMDiT:
    """A small model whose gates are open."""
    torch.manual_seed(0)
    model = effformer.build_model("mmdit-nano", **{"input_size": 8, **options})
    with torch.no_grad():
        for path, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(noise) if ".gates." in path else p.add_(noise * 0.1)
    assert isinstance(model, MMDiT)
    return model.eval()


def inputs(model: MMDiT, batch: int = 2) -> dict[str, Tensor]:
    return model.example_inputs(batch, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    preset = PRESETS[name]
    if preset.params is None:
        return
    assert sum(p.numel() for p in model.parameters()) == preset.params
    assert {n for n, _ in model.named_buffers()} == {"pos_embed"}
    assert model.state_dict().keys() >= {"pos_embed"}
    facts = registry.model.get(name).facts
    assert "Community License" in facts["licence"]
    assert facts["sampling"]["shift"] == 3.0


def test_parts_of_a_published_size_are_exchanged_by_name() -> None:
    with torch.device("meta"):
        model = effformer.build_model(
            "sd3.5-medium", attn="gated-delta", layers={"3::4": {"attn": "softmax"}}
        )
    mixers = [block.core.config.title for block in model.blocks]
    assert mixers == (["gated-delta"] * 3 + ["softmax"]) * 6
    assert [("attn2" in block.x.order) for block in model.blocks] == [True] * 13 + [False] * 11


def test_it_starts_with_a_zero_velocity_and_blocks_that_do_nothing() -> None:
    model = effformer.build_model("mmdit-nano").eval()
    assert not model(**inputs(model)).any()
    h, y = torch.randn(2, 9, 48), torch.randn(2, 5, 48)
    ctx = Context(cond=torch.randn(2, 48))
    for block in model.blocks:
        torch.testing.assert_close(block(h, y, ctx, ctx), (h, y), rtol=0, atol=0)


@pytest.mark.parametrize("dual", [0, 2])
@torch.no_grad()
def test_diffusers_computes_the_same(dual: int, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = awake(depth=3, attn={"qk_norm": dual > 0}, block={"name": "joint", "dual": dual})
    layout = next(lay for lay in model.LAYOUTS if lay.name == "diffusers")
    said = {k: v for k, v in layout.options(model.config).items() if k != "_class_name"}
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, joint_attention_dim=32,
        caption_projection_dim=48, pooled_projection_dim=32,
        **said | {"dual_attention_layers": tuple(range(dual))},
    ).eval()  # fmt: skip
    file = effformer.save_weights(model, tmp_path / "w.safetensors", layout)
    written = effformer.io.read_weights(file)  # type: ignore[attr-defined]
    assert written.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(written)
    x, t = torch.randn(2, 4, 6, 10), torch.tensor([3.0, 871.0])
    text, pooled = torch.randn(2, 5, 32), torch.randn(2, 32)
    expected = theirs(x, text, pooled, t).sample
    torch.testing.assert_close(model(x, t, text, pooled), expected, rtol=1e-4, atol=1e-5)
    expected = theirs(x, text, pooled, t, skip_layers=[1]).sample
    skipped = model(x, t, text, pooled, skip_layers=(-2,))
    torch.testing.assert_close(skipped, expected, rtol=1e-4, atol=1e-5)
    back = MMDiT(model.config).eval()
    report = effformer.load_weights(back, theirs.state_dict(), config=dict(theirs.config))
    assert report.layout == "diffusers"
    assert {"num_layers", "dual_attention_layers"} <= set(report.confirmed)
    assert all(torch.equal(x, model.state_dict()[k]) for k, x in back.state_dict().items())
    with pytest.raises(FormatError, match="num_layers is 4 there and 3 here"):
        effformer.load_weights(back, theirs.state_dict(), config={**theirs.config, "num_layers": 4})


def test_files_of_one_piece_hold_other_networks_too(tmp_path: Path) -> None:
    model = awake()
    file = effformer.save_weights(model, tmp_path / "w.safetensors", "single-file")
    state = effformer.io.read_weights(file)  # type: ignore[attr-defined]
    assert all(key.startswith("model.diffusion_model.") for key in state)
    around = {"first_stage_model.decoder.x": torch.ones(1), "text_encoders.t5.y": torch.ones(1)}
    again = awake(dim=48)
    report = effformer.load_weights(again, state | around)
    assert (report.layout, set(report.ignored)) == ("single-file", set(around))
    given = inputs(model)
    torch.testing.assert_close(again(**given), model(**given), rtol=0, atol=0)
    record = trained_of(again)
    assert record is not None
    assert (record.convention, record.null) == (effformer.flow.CONVENTIONS["sd3"], True)
    assert (record.latent_scale, record.latent_shift) == (1.5305, 0.0609)


def test_positions_are_the_middle_of_the_saved_table() -> None:
    model = effformer.build_model("mmdit-nano", table_size=7, input_size=8)
    table = torch.arange(49.0).view(1, 49, 1).expand(1, 49, 48)
    model.load_state_dict(model.state_dict() | {"pos_embed": table})
    assert model.positions(2, 3)[0, :, 0].tolist() == [16.0, 17, 18, 23, 24, 25]
    with pytest.raises(ValueError, match=r"16 x 4 is larger than the position table, .* 14 x 14"):
        model(**inputs(model) | {"x": torch.zeros(2, 4, 16, 4)})
    with pytest.raises(ValueError, match="table_size 7 is smaller than the grid of input_size 16"):
        effformer.build_model("mmdit-nano", table_size=7, input_size=16)


@pytest.mark.parametrize("core", CORES)
@torch.no_grad()
def test_every_core_of_a_set_or_a_row_runs_masked_and_packed(core: str) -> None:
    model = awake(attn=core)
    given = inputs(model, 3)
    mask = torch.arange(8) < torch.tensor([5, 8, 1])[:, None]
    out = model(**given, text_mask=mask)
    packed = model(**given, text_mask=mask, packed=True)
    torch.testing.assert_close(packed, out, rtol=1e-4, atol=1e-4 * float(out.abs().max()))
    for i, n in enumerate([5, 8, 1]):
        one = {k: v[i : i + 1] for k, v in given.items()}
        alone = model(**one | {"text": one["text"][:, :n]})
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_learns(options: dict[str, Any]) -> None:
    model = awake(**options).train()
    (model(**inputs(model)) * torch.randn(2, 4, 8, 8)).sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # nobody reads the text behind the last block, so its last queries mean nothing to a softmax
    assert all("blocks.1.y." in n and "q_norm" in n for n in silent)


def test_text_is_a_set_and_an_absent_one_is_zeros() -> None:
    model = awake()
    given = inputs(model)
    order = torch.randperm(given["text"].shape[1])
    again = model(**given | {"text": given["text"][:, order]})
    torch.testing.assert_close(again, model(**given), rtol=1e-4, atol=1e-5)
    field, x = adapt(model), given["x"]
    cond = {name: given[name] for name in ("text", "pooled")}
    null: dict[str, Any] = {"text": 0, "pooled": 0}
    grid = TimeGrid.sd3(3)
    weak = Weak(2.5, {"skip_layers": (0,)}, interval=(0.0, grid.points[1]))
    rules = [None, Guidance(5.0, null), Guidance(5.0, null, weak=weak)]
    outs = [sample(field, x, sampler="dpm++2m", grid=grid, guidance=g, **cond).x for g in rules]
    assert all(out.isfinite().all() for out in outs)
    assert not torch.allclose(outs[1], outs[2])
    with torch.no_grad():
        empty = {name: torch.zeros_like(value) for name, value in cond.items()}
        v, u = field(x, 0.5, **cond), field(x, 0.5, **empty)
        less = field(x, 0.1, **cond, skip_layers=(0,))
        w, o = field(x, 0.1, **cond), field(x, 0.1, **empty)
        guided = effformer.flow.guided(field, 5.0, null=null, weak=weak)
        torch.testing.assert_close(guided(x, 0.5, **cond), u + 5 * (v - u), rtol=1e-4, atol=1e-4)
        expected = o + 5 * (w - o) + 2.5 * (w - less)
        torch.testing.assert_close(guided(x, 0.1, **cond), expected, rtol=1e-4, atol=1e-4)


def test_published_weights_are_trained_on_in_their_convention() -> None:
    model = awake()
    model.trained = {"convention": "sd3", "null": True}
    drawn = {n: x for n, x in inputs(model, 8).items() if n != "t"}
    data, quick = Dataset("texts", drawn), TrainConfig(steps=2, batch=4, warmup=0, ema=None)
    with pytest.raises(ValueError, match=r"Generation\(convention=...\) trains any velocity"):
        train(model, data, Generation(), quick, progress=False)
    task = Generation.from_dict({"convention": "sd3", "loss": {"time": {"name": "shifted"}}})
    loss = task(model, drawn, torch.Generator().manual_seed(0), Ledger())
    own = task.loss.build()(
        adapt(model, "sd3"), drawn["x"], generator=torch.Generator().manual_seed(0),
        text=drawn["text"], pooled=drawn["pooled"],
    )  # fmt: skip
    torch.testing.assert_close(loss, own.loss)
    train(model, data, task, quick, progress=False)
    record = trained_of(model)
    assert record is not None
    assert record.convention == effformer.flow.CONVENTIONS["sd3"]
    with pytest.raises(ValueError, match="needs a loss of velocities on its path"):
        Generation.from_dict({"convention": "dit"})


@pytest.mark.slow
@pytest.mark.parametrize("options", [SHORT, *OPTIONS.values()], ids=["short", *OPTIONS])
def test_exported_graphs_serve_other_sizes_and_texts(
    options: dict[str, Any], tmp_path: Path
) -> None:
    report = export_onnx(awake(**options), tmp_path / "model.onnx")
    assert report.parity is not None
    assert report.parity.passed
    sizes = {(c.shapes["x"][2], c.shapes["text"][1]) for c in report.parity.cases}
    assert len({image for image, _ in sizes}) > 1
    assert len({words for _, words in sizes}) > 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_saved_models_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = awake(**options)
    with torch.no_grad():
        model.pos_embed.mul_(2)
    effformer.save_pretrained(model, tmp_path / "m")
    again = effformer.load_model(tmp_path / "m").eval()
    assert again.config == model.config
    torch.testing.assert_close(again(**inputs(model)), model(**inputs(model)), rtol=0, atol=0)


def test_profiles_add_up() -> None:
    for name in ("sd3.5-medium", "dynamic"):
        model = awake(**OPTIONS[name])
        found = profile(model, inputs(model, 1))
        assert not found.uncounted
        assert found.by_module["blocks"] == sum(b.macs(16, 8) for b in model.blocks)
    assert found.executed < found.total


@torch.no_grad()
def test_quantized_and_averaged_copies_agree() -> None:
    model = awake()
    given = inputs(model)
    out = model(**given)
    small, report = quantize(model, "int8", inputs=given)
    assert report.bytes_after < 0.6 * report.bytes_before
    torch.testing.assert_close(small(**given), out, rtol=0, atol=0.05 * float(out.abs().max()))
    average, fresh = EMA(model), awake(dim=48)
    average.update(model)
    for p in fresh.parameters():
        p.zero_()
    average.copy_to(fresh)
    torch.testing.assert_close(fresh(**given), out)


@torch.no_grad()
def test_dynamic_and_adaptive_parts_reach_the_second_attention() -> None:
    model = awake(**OPTIONS["dynamic"])
    given, ledger = inputs(model) | {"t": torch.full((2,), 300.0)}, Ledger()
    out, place = model(**given, ledger=ledger), "blocks.0.x.attn2"
    assert place in ledger.shares
    torch.testing.assert_close(model(**given, tap=Tap()), out, rtol=1e-4, atol=1e-4)
    assert place in prepare_widths(model, torch.tensor([100.0, 300.0])).active
    torch.testing.assert_close(model(**given), out, rtol=1e-4, atol=1e-4)
    plain = awake()
    out = plain(**given)
    sort_by_magnitude(plain)
    torch.testing.assert_close(plain(**given), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(optimize(plain)(**given), out, rtol=1e-4, atol=1e-4)
    student, report = acmize(plain)
    assert f"{place}.part.q" in report.places
    student(**given, ledger=ledger)
    assert place in ledger.executed


def test_taps_see_every_place() -> None:
    model = awake()
    tap = Tap(keep=("*",))
    model(**inputs(model), tap=tap)
    assert {"blocks.0.x.attn", "blocks.0.x.attn2.q", "blocks.0.y.ffn", "blocks.1.x.ffn"} <= set(
        tap.seen
    )
    assert "blocks.1.x.attn2" not in tap.seen


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text": torch.zeros(2, 8, 7)}, "mmdit-nano: text"),
        ({"pooled": torch.zeros(1, 32)}, "mmdit-nano: pooled"),
        ({"pooled": None}, r"the pooled text is missing; give pooled \(B, 32\)"),
        ({"x": torch.zeros(2, 3, 8, 8)}, "mmdit-nano: x"),
        ({"x": torch.zeros(2, 4, 7, 8)}, "not divisible by patch"),
        ({"packed": True}, "needs text_mask"),
        ({"skip_layers": (0, 5)}, "names block 5, but there are 2 blocks"),
        ({"skip_layers": "1"}, "names block '1', but there are 2 blocks"),
        ({"skip_layers": 1}, r"lists blocks, such as \(1,\)"),
    ],
)
def test_wrong_inputs_are_refused(changes: dict[str, Any], match: str) -> None:
    model = awake()
    with pytest.raises((ValueError, TypeError), match=match):
        model(**inputs(model) | changes)
