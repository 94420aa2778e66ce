"""TripoSG: a set of latents, two conditions, long skips, experts, layouts, sampling, export, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import quantize
from effformer.export import export_onnx
from effformer.models import TripoSG

import effformer
from effformer.cache import cached
from effformer.checks import CapabilityError, FormatError
from effformer.context import Ledger, Tap
from effformer.flow import Guidance, adapt, guided, sample
from effformer.profile import profile

from .small import inputs, woken

NAMES = ("triposg-nano", "triposg-two-nano")
EXPERTS = {"-2:": {"ffn": {"name": "moe", "experts": 4, "shared": 1}}}


def awake(name: str = "triposg-nano", **options: Any) -> TripoSG:
    """A small model with nothing at zero."""
    model = woken(name, **options)
    assert isinstance(model, TripoSG)
    return model


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_latents_and_features_are_sets(name: str) -> None:
    model = awake(name)
    given = inputs(model)
    out = model(**given)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        model(**given | {"x": given["x"][:, order]}), out[:, order], rtol=1e-4, atol=1e-5
    )
    for feature in set(given) - {"x", "t"}:
        torch.testing.assert_close(
            model(**given | {feature: given[feature].flip(1)}), out, rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(model(**given | {feature: given[feature] + 1}), out, atol=1e-2)
    more = model(**given | {"x": torch.randn(2, 31, 8)})
    assert more.shape == (2, 31, 8)


@pytest.mark.parametrize("depth", [1, 2, 4, 5])
@torch.no_grad()
def test_what_leaves_the_first_half_enters_the_second(depth: int) -> None:
    model = awake(depth=depth)
    assert [(i, j) for i, j in model.long_skips if i + j != 2 * (depth // 2)] == []
    assert set(model.skips) == {str(i) for i in range(depth // 2 + 1, depth)}
    given, left, entered = inputs(model), {}, {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, args, out, i=i: left.__setitem__(i, out))
    for j, skip in model.skips.items():
        skip.register_forward_hook(lambda _, args, out, j=int(j): entered.__setitem__(j, args))
    model(**given)
    assert entered.keys() == {j for _, j in model.long_skips}
    for i, j in model.long_skips:
        assert torch.equal(entered[j][0], left[j - 1])
        assert torch.equal(entered[j][1], left[i])


@torch.no_grad()
def test_scales_of_the_conditions() -> None:
    model = awake("triposg-two-nano")
    given, tap = inputs(model), Tap(keep=("blocks.*.cross*",))
    out = model(**given)
    torch.testing.assert_close(model(**given, tap=Tap()), out)
    half = model(**given, image_scale=0.5, second_scale=0.0, tap=tap)
    assert not torch.allclose(half, out, atol=1e-2)
    assert not any(tap.seen[f"blocks.{i}.cross_2"].any() for i in range(5))
    changed = given | {"second": given["second"] + 1}
    assert torch.equal(model(**changed, image_scale=0.5, second_scale=0.0), half)


def test_every_parameter_learns() -> None:
    for name, options in ((NAMES[0], {"layers": EXPERTS}), (NAMES[1], {})):
        model, ledger = awake(name, **options).train(), Ledger()
        (model(**inputs(model, 4), ledger=ledger).square().sum() + ledger.total_loss()).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = effformer.build_model("triposg-moe")
    dense, expert = 1_439_556_160, 2 * 2048 * 8192 + 2048 + 8192
    assert sum(p.numel() for p in model.parameters()) == dense + 6 * (8 * expert + 8 * 2048)


@torch.no_grad()
def test_guided_samples_of_an_image() -> None:
    model = awake()
    field, x = adapt(model), torch.randn(2, 15, 8)
    cond = {"image": torch.randn(2, 6, 24)}
    torch.testing.assert_close(field(x, 0.25, **cond), model(x, torch.full((2,), 750.0), **cond))
    u, v = field(x, 0.25, image=torch.zeros(2, 6, 24)), field(x, 0.25, **cond)
    found = guided(field, 7.0, null={"image": 0.0})(x, 0.25, **cond)
    torch.testing.assert_close(found, u + 7.0 * (v - u), rtol=1e-4, atol=1e-4)
    out = sample(field, x, steps=2, guidance=Guidance(7.0, {"image": 0.0}), **cond).x
    assert out.shape == x.shape


@torch.no_grad()
def test_caching_keeps_long_skips_within_its_range() -> None:
    model = awake()
    cond, x = {"image": torch.randn(1, 6, 24)}, torch.randn(1, 15, 8)
    exact = sample(adapt(model), x, steps=12, **cond).x
    for options in ({}, {"blocks": slice(1, 5)}, {"blocks": slice(2, 3)}):
        field = cached(adapt(model), {"name": "reuse", "every": 1}, **options)
        torch.testing.assert_close(
            sample(field, x, steps=12, **cond).x, exact, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(CapabilityError, match="leaves block 1 of triposg-nano enters block 3, too"):
        cached(adapt(model), "reuse", blocks=slice(1, 3))


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_published_files_come_back(name: str, tmp_path: Path) -> None:
    model, other = awake(name), effformer.build_model(name).eval()
    given = inputs(model)
    expected = model(**given)
    again = effformer.load_model(effformer.save_pretrained(model, tmp_path / "m"))
    torch.testing.assert_close(again(**given), expected, rtol=0, atol=0)
    published = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    effformer.load_weights(other, published)
    torch.testing.assert_close(other(**given), expected, rtol=0, atol=0)
    sibling = effformer.build_model(next(n for n in NAMES if n != name))
    with pytest.raises(FormatError, match=r"blocks\.0\..*(cross_2|norm2_2|attn2_2)"):
        effformer.load_weights(sibling, published)


def test_other_parts_in_the_blocks() -> None:
    for attn in ("flow", "gated-delta", "performer"):
        model = awake("triposg-two-nano", attn=attn, layers={"2": {"attn": "softmax"}})
        assert model(**inputs(model)).isfinite().all()
    model = awake("triposg-two-nano", cross="flow", width="dynamic")
    assert model(**inputs(model)).isfinite().all()
    with pytest.raises(
        CapabilityError, match=r"2 memories run side by side \(one memory would do\)"
    ):
        effformer.build_model("triposg-two-nano", tokens="dynamic")


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_holds_both_halves_and_conditions() -> None:
    model = awake("triposg-two-nano")
    given = inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given), model(**given), rtol=1e-4, atol=1e-5)


def test_the_profiler_counts_both_conditions() -> None:
    one, two = (profile(awake(name), memory=False) for name in NAMES)
    c = awake(NAMES[1]).config
    further = 16 * 2 * c.dim**2 + c.second_length * c.second_dim * 2 * c.dim
    further += 2 * 16 * c.second_length * c.dim
    assert two.total - one.total == c.depth * further
    assert not two.uncounted


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_exports_for_other_numbers_of_latents(name: str, tmp_path: Path) -> None:
    report = export_onnx(awake(name, depth=3), tmp_path / "m.onnx")
    assert report.parity is not None
    assert report.parity.passed
    assert len({c.shapes["x"][1] for c in report.parity.cases}) > 1


@pytest.mark.slow
def test_it_is_exported_with_packed_weights(tmp_path: Path) -> None:
    """The token of the time asks its layer for a width, whatever stands in its place."""
    model = awake()
    small, _ = quantize(model, "int8", data=inputs(model))
    report = export_onnx(small, tmp_path / "m.onnx")
    assert "com.microsoft::MatMulNBits" in report.graph.operators
    assert report.parity is not None
    assert report.parity.passed


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        (NAMES[0], {"second": torch.ones(2, 6, 20)}, CapabilityError, "second_dim=20 would take"),
        (NAMES[1], {"second": None}, ValueError, "second condition is missing; give second"),
        (NAMES[1], {"second": torch.ones(2, 6, 24)}, ValueError, r"second: expected .* 20\)"),
        (NAMES[0], {"image": torch.ones(2, 6, 23)}, ValueError, r"image: expected .* 24\)"),
        (NAMES[0], {"image": torch.ones(3, 6, 24)}, ValueError, "image: expected"),
        (NAMES[0], {"x": torch.ones(2, 4, 9)}, ValueError, r"x: expected .* 8\)"),
        (NAMES[0], {"t": torch.ones(1)}, ValueError, r"t: expected shape \(B,\)"),
    ],
)
def test_bad_input(
    name: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = effformer.build_model(name)
    given = {k: x for k, x in inputs(model, 2, **changes).items() if x is not None}
    with pytest.raises(error, match=message):
        model(**given)
    with pytest.raises(ValueError, match="dim must be even"):
        effformer.build_model(name, dim=33, heads=1)
