"""FlowSep: text and mixture, the way through the network, objective, layouts, exchanged parts, export, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import plan, quantize
from effformer.export import export_onnx
from effformer.models import FlowSep

import effformer
from effformer.cache import cached
from effformer.checks import CapabilityError, FormatError
from effformer.flow import FlowMatching, adapt, get_convention, sample
from effformer.profile import profile

from .small import inputs, woken


def awake(**options: Any) -> FlowSep:
    """A small model with nothing at zero."""
    model = woken("flowsep-tiny", **options)
    assert isinstance(model, FlowSep)
    return model


@torch.no_grad()
def test_text_mixture_and_time_are_seen_and_padding_is_not() -> None:
    model = awake()
    given = inputs(model)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    out = model(**given, text_mask=mask)
    padded = given["text"].clone()
    padded[1, 4:] = 7.0
    torch.testing.assert_close(model(**given | {"text": padded}, text_mask=mask), out)
    alone = {k: v[1:] for k, v in given.items()} | {"text": given["text"][1:, :4]}
    torch.testing.assert_close(model(**alone), out[1:], rtol=1e-4, atol=1e-5)
    for name in ("text", "mixture", "t"):
        changed = model(**given | {name: given[name] + 1}, text_mask=mask)
        assert not torch.allclose(changed, out, atol=1e-2), name
    larger = {k: torch.cat([given[k]] * 2, dim=2) for k in ("x", "mixture")}
    assert model(**given | larger).shape == (2, 4, 16, 4)


@torch.no_grad()
def test_a_new_model_answers_zero_and_further_outputs_count_nothing() -> None:
    model = effformer.build_model("flowsep-tiny")
    given = inputs(model)
    assert not model(**given).any()
    model = awake()
    out = model(**given)
    model.head.weight[4:] = 9.0
    assert torch.equal(model(**given), out)
    assert model.head.weight.shape[0] == 8


def test_every_parameter_learns() -> None:
    model = awake().train()
    model(**inputs(model)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_way_of_the_published_size() -> None:
    """Numbers of the released network's modules: 12 down with the first convolution, 12 up."""
    config = effformer.registry.model.get("flowsep").preset
    assert isinstance(config, FlowSep.Config)
    assert [s.width for s in config.down if s.convolves] == [128] * 2 + [256] * 2 + [384] * 2 + [
        640
    ] * 2
    assert [s.entering - s.width for s in config.up[:3]] == [640, 640, 384]
    assert (len(config.down), len(config.up)) == (11, 12)
    places = 6 + 1 + 9
    assert config.depth == 3 * places
    with torch.device("meta"):
        model = effformer.build_model("flowsep")
    far = [i for i, block in enumerate(model.blocks) if block.far]
    assert far == list(range(2, 3 * places, 3))
    assert [i for i, block in enumerate(model.blocks) if "ffn" not in block.order] == [
        i - 2 for i in far
    ]
    assert {block.site.dim // block.site.heads for block in model.blocks} == {32}


def test_what_leaves_the_way_down_enters_the_way_up() -> None:
    model = awake(multipliers=(1, 2, 2), attention=(2, 4))
    assert model.config.depth == 21
    assert model.long_skips == [(2, 12), (2, 15), (5, 9)]
    shapes: dict[int, tuple[int, ...]] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: shapes.__setitem__(i, out.shape[1:]))
    model(**inputs(model))
    assert [shapes[i] for i in (0, 3, 6, 9, 12, 15, 18)] == (
        [(8, 32), (2, 32), (2, 32), (2, 32), (2, 32), (8, 32), (8, 32)]
    )


def test_objective_and_sampler() -> None:
    """The path ends s away from the data, and a perfect velocity reaches that end in any number of steps."""
    path, s = get_convention("flowsep").path, 1e-4
    z, eps = (
        torch.randn(2, 3, 4, 2, dtype=torch.float64),
        torch.randn(2, 3, 4, 2, dtype=torch.float64),
    )
    u = z - (1 - s) * eps
    point = path.plan(torch.tensor([0.0, 1.0]).double(), z, eps)
    torch.testing.assert_close(point.x, torch.stack([eps[0], (z + s * eps)[1]]))
    torch.testing.assert_close(point.velocity, u)
    for steps in (1, 3, 10):
        found = sample(lambda x, t: u, eps, steps=steps).x
        torch.testing.assert_close(found, z + s * eps)
    model = awake()
    given = inputs(model)
    cond = {"text": given["text"], "mixture": given["mixture"]}
    runs = [sample(adapt(model), given["x"], steps=3, **cond) for _ in range(2)]
    assert runs[0].nfe == 3
    assert torch.equal(runs[0].x, runs[1].x)
    loss = FlowMatching(FlowMatching.Config(path=path))
    drawn = loss(model, given["x"], noise=torch.randn_like(given["x"]), t=given["t"], **cond)
    torch.testing.assert_close(
        drawn.loss, (model(drawn.x, given["t"], **cond) - drawn.target).square().mean()
    )


@torch.no_grad()
def test_saved_and_released_files_come_back(tmp_path: Path) -> None:
    published = {"groups": 32, "dim": 32, "multipliers": (1, 1)}
    model = awake(**published)
    given = inputs(model)
    expected = model(**given)
    again = effformer.load_model(effformer.save_pretrained(model, tmp_path / "m"))
    assert torch.equal(again(**given), expected)
    _, single = model.LAYOUTS
    released = single.from_ours(model.state_dict(), model.config)
    assert all(key.startswith("model.diffusion_model.") for key in released)
    around = {"first_stage_model.encoder.weight": torch.zeros(2), "betas": torch.zeros(3)}
    average = {
        key.replace("model.", "model_ema.", 1)
        .replace(".", "")
        .replace("model_ema", "model_ema.", 1): x
        for key, x in released.items()
    }
    for extra, averaged in ((around, False), (around | average, True)):
        other = effformer.build_model("flowsep-tiny", **published).eval()
        kept = {k: x if not averaged or k in around else x + 1 for k, x in released.items()}
        report = effformer.load_weights(other, kept | extra)
        assert (report.layout, report.averaged) == ("single-file", averaged)
        torch.testing.assert_close(other(**given), expected)


def test_what_the_published_network_has_not_is_refused(tmp_path: Path) -> None:
    for options in ({"groups": 8}, {"time_scale": 1000.0}, {"attn": "flow"}):
        model = awake(**{"groups": 32, "dim": 32} | options)
        with pytest.raises(FormatError, match=f"layout 'official' has no {next(iter(options))}"):
            effformer.save_weights(model, tmp_path / "w.safetensors", "official")


@torch.no_grad()
def test_parts_are_exchanged_cut_and_quantized() -> None:
    model = awake(attn="flow", layers={"2::3": {"cross": "linear", "ffn": "swiglu"}})
    given = inputs(model)
    titles = [block.attn.part.config.title for block in model.blocks]
    assert titles == ["flow"] * 12
    assert model.blocks[2].cross.part.config.title == "linear"
    assert type(model.blocks[1].ffn.part).__name__ == "GEGLU"
    assert type(model.blocks[2].ffn.part).__name__ == "SwiGLU"
    assert model(**given).isfinite().all()
    groups = {group.path for group in plan(awake()).groups}
    assert {"blocks.0.attn.part", "blocks.2.cross.part", "blocks.2.ffn.part"} <= groups
    small, report = quantize(awake(), "int8")
    layers = {layer.name for layer in report.layers}
    assert {"down.0.residual.time", "down.2.cells.0.enter", "blocks.0.attn.part.qkv"} <= layers
    full = awake()(**given)
    assert (small(**given) - full).norm() < 0.1 * full.norm()


@torch.no_grad()
def test_blocks_are_cached_to_the_end_of_the_way() -> None:
    model = awake()
    given = inputs(model)
    cond = {"text": given["text"], "mixture": given["mixture"]}
    field = cached(adapt(model), {"name": "newton", "every": 1})
    expected = sample(adapt(model), given["x"], steps=9, **cond).x
    torch.testing.assert_close(sample(field, given["x"], steps=9, **cond).x, expected)
    with pytest.raises(CapabilityError, match=r"what leaves block 2 .* enters block 6, too"):
        cached(adapt(model), "newton", blocks=slice(1, 5))


def test_work_of_convolutions_has_a_name() -> None:
    found = profile(awake(), inputs(awake(), 1), memory=False)
    c = 16
    first = 8 * 4 * 9 * c * 2 * c  # the first residual block
    assert found.by_module["down.0.residual"] == first + c * 64
    assert 0.5 < found.by_part["convs"] / found.total < 0.6


@pytest.mark.slow
def test_exports_for_other_sizes_and_texts(tmp_path: Path) -> None:
    report = export_onnx(awake(), tmp_path / "m.onnx")
    assert report.parity is not None
    assert report.parity.passed
    sizes = {(c.shapes["x"][2], c.shapes["text"][1]) for c in report.parity.cases}
    assert len({side for side, _ in sizes}) > 1
    assert len({words for _, words in sizes}) > 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mixture": None}, ValueError, r"mixture is missing; give mixture \(B, 4, H, W\)"),
        ({"mixture": torch.ones(2, 4, 4, 4)}, ValueError, r"mixture: expected .* 4, H, W\) of x"),
        ({"x": torch.ones(2, 3, 8, 4)}, ValueError, r"x: expected .* 4, H, W\)"),
        (
            {"x": torch.ones(2, 4, 7, 4), "mixture": torch.ones(2, 4, 7, 4)}, ValueError,
            r"\(7, 4\) is not divisible by 2",
        ),
        ({"text": torch.ones(2, 6, 11)}, ValueError, r"text: expected .* 12\)"),
        ({"text_mask": torch.ones(2, 6)}, TypeError, "text_mask: expected bool"),
    ],
)  # fmt: skip
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model = effformer.build_model("flowsep-tiny")
    given = {k: x for k, x in inputs(model, 2, **changes).items() if x is not None}
    with pytest.raises(error, match=message):
        model(**given)


def test_no_mixture_for_a_model_without() -> None:
    model = effformer.build_model("flowsep-tiny", mixture=0)
    given = inputs(model)
    assert model(**given).shape == (2, 4, 8, 4)
    with pytest.raises(
        ValueError, match=r"built without a mixture \(mixture=0\); leave mixture out"
    ):
        model(**given, mixture=given["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": (3,)}, r"attention: no size is 3 times smaller; sizes: \[1, 2\]"),
        ({"groups": 5}, "16 channels are not divisible by groups 5"),
        ({"head_dim": 5}, "32 channels are not divisible by head_dim 5"),
        ({"input_size": (7, 4)}, r"input_size \(7, 4\) is not divisible by 2"),
        ({"multipliers": ()}, "multipliers: give one for every size"),
        ({"layers": {"0": {"residual": "mlp"}}}, "unknown part 'residual'"),
        ({"layers": {"0": {"cross": "flow"}}}, "unknown part 'cross'"),
        ({"block": "macaron"}, "cannot do without an FFN; choices: gated, iterate, postnorm, prenorm"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, CapabilityError), match=message):
        effformer.build_model("flowsep-tiny", **options)
