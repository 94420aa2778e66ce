"""Factorized attention on grids of one to three axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import export_onnx
from torch import Tensor

import effformer
from effformer.attention import FactorizedChained, FactorizedParallel
from effformer.attention.factorized import AxisKernel
from effformer.attention.reference_factorized import (
    axis_kernel_reference,
    chained_reference,
    parallel_reference,
)
from effformer.blocks import BackboneConfig, Needs, build_stack
from effformer.checks import CapabilityError
from effformer.context import Context, Tap
from effformer.nn.positions import grid_positions
from effformer.profile import Counter
from effformer.site import Site

KINDS = [FactorizedParallel, FactorizedChained]
GRIDS = [(6,), (4, 3), (3, 2, 4)]
DIM, HEADS = 12, 2
Mixer = FactorizedParallel | FactorizedChained


def make(kind: type[Any], axes: int = 2, *, site: Site | None = None, **knobs: Any) -> Mixer:
    torch.manual_seed(1)
    site = site or Site(dim=DIM, heads=HEADS, path="here")
    part: Mixer = kind(kind.Config(axes=axes, **knobs), site).double()
    with torch.no_grad():
        for p in part.parameters():
            p.normal_(std=0.4)
    return part


def cells(grid: tuple[int, ...], batch: int = 2) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, int(torch.tensor(grid).prod()), DIM, dtype=torch.float64)


def coords(grid: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.rand(n, dtype=torch.float64).cumsum(0) for n in grid)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("norm", ["instance", "head"])
def test_equals_the_definition(kind: type[Any], grid: tuple[int, ...], norm: str) -> None:
    part = make(kind, len(grid), norm=norm, multiplier=2)
    x, where, tap = cells(grid, 1).requires_grad_(), coords(grid), Tap(keep=("*",))
    out = part(x, Context(grid=grid, positions=grid_positions(where), tap=tap))
    slow = _slow(part, x, grid, where)
    torch.testing.assert_close(out, slow)
    weight = torch.randn_like(out)
    fast_grad = torch.autograd.grad((out * weight).sum(), [x, *part.parameters()])
    slow_grad = torch.autograd.grad((slow * weight).sum(), [x, *part.parameters()])
    torch.testing.assert_close(fast_grad, slow_grad)


def _slow(part: Mixer, x: Tensor, grid: tuple[int, ...], where: tuple[Tensor, ...]) -> Tensor:
    """The paper's order: project every cell, then average, then one head after the other."""
    u = x[0].unflatten(0, grid)
    kernels = []
    for a, axis in enumerate(part.axes):
        assert isinstance(axis, AxisKernel)
        z = axis.proj(part.pool(u)).movedim(a, 0).reshape(grid[a], -1, DIM).mean(1)
        value, factor = axis.fc1(axis.norm(z)).chunk(2, dim=-1)
        p = axis.fc2(torch.nn.functional.gelu(value) * factor)
        q, k = axis.qk(p).chunk(2, dim=-1)
        heads = zip(q.chunk(HEADS, dim=-1), k.chunk(HEADS, dim=-1), strict=True)
        kernels.append([axis_kernel_reference(q, k, where[a]) for q, k in heads])
    mix = parallel_reference if isinstance(part, FactorizedParallel) else chained_reference
    heads = []
    for h, v in enumerate(part.v(u).chunk(HEADS, dim=-1)):
        mixed = mix([per_axis[h] for per_axis in kernels], v).flatten(0, -2)
        if part.config.norm == "instance":
            var, mean = mixed.var(0, correction=0), mixed.mean(0)
        else:
            var, mean = mixed.var(), mixed.mean()
        heads.append((mixed - mean) / (var + part.eps) ** 0.5)
    h = torch.cat(heads, dim=-1)
    return part.fc2(torch.nn.functional.gelu(part.fc1(h)))[None]


def _replaced(part: Mixer, x: Tensor, grid: tuple[int, ...], places: dict[str, Any]) -> Tap:
    """Run with kernels replaced: place -> function of the kernel."""
    tap = Tap(
        keep=("*",),
        edit=lambda place, value: places[place](value),
        at=tuple(places),
    )
    part(x, Context(grid=grid, tap=tap))
    return tap


def test_slots_of_the_parallel_form_are_independent() -> None:
    part, grid = make(FactorizedParallel, 3), (3, 2, 4)
    x, width = cells(grid), DIM // HEADS
    whole = _replaced(part, x, grid, {"here.v": lambda v: v}).seen["here.mixed"]
    zero = {f"here.kernel.{a}": torch.zeros_like for a in (1, 2)}
    alone = _replaced(part, x, grid, zero).seen["here.mixed"]
    torch.testing.assert_close(alone[..., :width], whole[..., :width])
    assert not alone[..., width:].any()
    assert whole[..., width:].any()


def test_identity_kernels_leave_an_axis_alone_in_the_chained_form() -> None:
    part, grid = make(FactorizedChained, 3), (3, 2, 4)
    x = cells(grid)
    identity = {"here.kernel.0": lambda k: torch.eye(3).to(k).expand_as(k)}
    one = _replaced(part, x, grid, identity)
    v = one.seen["here.v"]
    changed = x.unflatten(1, grid).clone()
    k_y, k_z = one.seen["here.kernel.1"], one.seen["here.kernel.2"]
    by_hand = torch.einsum("bhij,bhkl,bhxjlc->bhxikc", k_y, k_z, v.unflatten(2, grid))
    torch.testing.assert_close(one.seen["here.mixed"], by_hand.flatten(2, 4))
    assert changed.shape == (2, *grid, DIM)


@pytest.mark.parametrize("kind", KINDS)
def test_moving_all_coordinates_changes_nothing(kind: type[Any]) -> None:
    part, grid = make(kind, 3), (3, 2, 4)
    x, where = cells(grid), coords(grid)
    moved = tuple(c + 0.37 * (a + 1) for a, c in enumerate(where))
    out = part(x, Context(grid=grid, positions=grid_positions(where)))
    torch.testing.assert_close(part(x, Context(grid=grid, positions=grid_positions(moved))), out)
    stretched = tuple(1.1 * c for c in where)
    assert not torch.allclose(part(x, Context(grid=grid, positions=grid_positions(stretched))), out)


@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_count_from_zero_to_one_by_default(kind: type[Any]) -> None:
    part, grid = make(kind), (4, 3)
    x = cells(grid)
    unit = tuple(torch.linspace(0, 1, n, dtype=torch.float64) for n in grid)
    expected = part(x, Context(grid=grid, positions=grid_positions(unit)))
    torch.testing.assert_close(part(x, Context(grid=grid)), expected)
    flat = make(kind, rope=False)
    torch.testing.assert_close(
        flat(x, Context(grid=grid, positions=grid_positions(coords(grid)))),
        flat(x, Context(grid=grid)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_transposing_the_grid_with_its_axes_commutes(kind: type[Any]) -> None:
    part, turned, grid = make(kind), make(kind), (4, 3)
    state = part.state_dict()
    swapped = {}
    for key, value in state.items():
        name = (
            key.replace("axes.0", "axes.x").replace("axes.1", "axes.0").replace("axes.x", "axes.1")
        )
        swapped[name] = value
    if kind is FactorizedParallel:  # its slots change places as well
        slots = state["fc1.weight"].unflatten(1, (HEADS, 2, -1)).flip(2)
        swapped["fc1.weight"] = slots.flatten(1)
    turned.load_state_dict(swapped)
    x = cells(grid)
    across = x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    out = part(x, Context(grid=grid)).unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(turned(across, Context(grid=grid[::-1])), out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["instance", "head"])
def test_the_norm_forgets_the_size_of_the_values(kind: type[Any], norm: str) -> None:
    part, grid = make(kind, norm=norm, eps=1e-14), (4, 3)
    x = cells(grid)
    out = part(x, Context(grid=grid))
    with torch.no_grad():
        part.v.weight.mul_(-7.5)
    scaled = part(x, Context(grid=grid))
    # the sign of the values turns with the factor
    with torch.no_grad():
        part.fc1.weight.mul_(-1)
    torch.testing.assert_close(part(x, Context(grid=grid)), out, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(scaled, out)


@pytest.mark.parametrize("kind", KINDS)
def test_work_follows_the_axes(kind: type[Any]) -> None:
    part = make(kind, 3, site=Site(dim=DIM, heads=HEADS, out_dim=10), latent_dim=7).float()

    def traced(grid: tuple[int, ...]) -> int:
        counts = []
        for batch in (2, 3):
            x = cells(grid, batch).float()
            with Counter(part) as counter:
                assert part(x, Context(grid=grid)).shape == (batch, x.shape[1], 10)
            counts.append(sum(tally.macs for tally in counter.rows.values()))
        return counts[1] - counts[0]

    for grid in ((3, 2, 4), (3, 2, 8), (5, 1, 1)):
        assert part.macs(grid[0] * grid[1] * grid[2], grid=grid) == traced(grid)
    growth = [part.macs(6 * n, grid=(3, 2, n)) for n in (100, 200)]
    fixed = sum(part.axes[a].macs(n) for a, n in ((0, 3), (1, 2)))  # type: ignore[operator]
    own = [part.axes[2].macs(n) + 6 * n * n * DIM for n in (100, 200)]  # type: ignore[operator]
    rest = [g - fixed - o for g, o in zip(growth, own, strict=True)]
    assert rest[1] - 5 * DIM * DIM == 2 * (rest[0] - 5 * DIM * DIM)  # linear in the cells


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_stay_wide_in_half_precision(kind: type[Any]) -> None:
    part, grid, tap = make(kind).float(), (8, 8), Tap(keep=("*",))
    x = cells(grid).float()
    expected = part(x, Context(grid=grid))
    out = part.to(torch.bfloat16)(x.bfloat16(), Context(grid=grid, tap=tap))
    assert out.dtype == torch.bfloat16
    assert {tap.seen[f"here.{name}"].dtype for name in ("kernel.0", "v", "normed")} == {
        torch.float32
    }
    assert (out - expected).norm() < 0.05 * expected.norm()


def test_initial_kernels_are_small_and_the_scale_follows_the_multiplier() -> None:
    torch.manual_seed(0)
    site = Site(dim=DIM, heads=HEADS)
    axis = FactorizedParallel(FactorizedParallel.Config(), site).axes[0]
    assert isinstance(axis, AxisKernel)
    one = FactorizedParallel(FactorizedParallel.Config(gain=1.0), site).axes[0]
    assert isinstance(one, AxisKernel)
    assert one.qk.weight.abs().max() > 40 * axis.qk.weight.abs().max()
    bound = 0.02 * (6 / (DIM + HEADS * axis.width)) ** 0.5
    assert 0.9 * bound < axis.qk.weight.abs().max() <= bound
    scales = []
    for knobs in ({"multiplier": 4}, {"multiplier": 5}, {"scale": 0.3, "multiplier": 5}):
        part = FactorizedParallel(FactorizedParallel.Config(**knobs), site).axes[0]
        scales.append(part._scale)  # type: ignore[operator]
    assert scales == [1.0, 30**-0.5, 0.3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["factorized-parallel", "factorized-chained"])
def test_works_in_dit_at_other_sizes_and_exports(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = effformer.build_model("dit-nano", attn=name, depth=1, input_size=8, num_classes=3)
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    inputs = model.example_inputs(2)
    out = model(**inputs)
    wide = model(torch.randn(2, 4, 8, 12), inputs["t"], inputs["y"])
    assert wide.shape == (2, 8, 8, 12)
    out.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "pos_embed")
    report = export_onnx(model, tmp_path / "dit.onnx", inputs, dynamic=model.dynamic_axes())
    assert report.parity is not None
    assert report.parity.passed


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused(kind: type[Any]) -> None:
    part, x = make(kind), cells((4, 3))
    with pytest.raises(CapabilityError, match=r"here: needs ctx.grid with 2 axes, got None"):
        part(x)
    with pytest.raises(
        CapabilityError, match=r"grids of 2 axes, but the grid is \(3, 2, 2\); .*axes=3"
    ):
        part(x, Context(grid=(3, 2, 2)))
    with pytest.raises(
        CapabilityError, match=r"1 tokens stand in front of the grid .*pool by 'avg'"
    ):
        part(x[:, 1:], Context(grid=(5, 2)))
    with pytest.raises(ValueError, match=r"grid \(5, 3\) does not fit 12 tokens"):
        part(x, Context(grid=(5, 3)))
    with pytest.raises(ValueError, match=r"shape \(1, 12, 3\), but 12 tokens on the grid \(4, 3\)"):
        part(x, Context(grid=(4, 3), positions=torch.zeros(1, 12, 3)))
    with pytest.raises(
        ValueError, match=r"macs\(12, grid=...\) needs 2 axes with 12 cells, got None"
    ):
        part.macs(12)
    with pytest.raises(
        ValueError, match=r"axes=2, but the grid of this model has 3; leave axes out"
    ):
        make(kind, 2, site=Site(dim=DIM, heads=HEADS, grid=(None,) * 3))
    free = kind(kind.Config(), Site(dim=DIM, heads=HEADS, grid=(None,) * 3))
    assert len(free.axes) == 3
    with pytest.raises(ValueError, match=r"width 12 is not divisible by 5 heads"):
        make(kind, site=Site(dim=12, heads=5))
    with pytest.raises(ValueError, match=r"head_dim 3 times multiplier 1 is odd; .*rope=False"):
        make(kind, head_dim=3, multiplier=1)
    with pytest.raises(ValueError, match=r"axes must be at least 1, got 0"):
        kind.Config(axes=0)
    with pytest.raises(ValueError, match=r"eps must be positive, got 0.0"):
        kind.Config(eps=0.0)


def test_models_with_tokens_in_front_of_the_grid_are_refused_when_built() -> None:
    small = {"image_size": 32, "patch": 8, "depth": 1, "num_classes": 5}
    with pytest.raises(
        CapabilityError,
        match=r"'factorized-parallel' has no place for tokens in front.*choices: .*softmax",
    ):
        effformer.build_model("vit-nano", attn="factorized-parallel", **small)
    model = effformer.build_model(
        "vit-nano", attn="factorized-parallel", **small,
        prefix={"class_token": False}, head={"pool": "avg"},
    )  # fmt: skip
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert effformer.build_model("vit-nano", ffn="glumbconv", **small) is not None


def test_models_without_a_grid_are_refused_when_built() -> None:
    config = BackboneConfig(dim=DIM, depth=1, heads=HEADS, attn=FactorizedChained.Config())
    with pytest.raises(
        CapabilityError,
        match=r"m blocks\[0:1\].attn: 'factorized-chained' needs a token grid, .*flow",
    ):
        build_stack(config, Site(dim=DIM, heads=HEADS), Needs(), name="m")
