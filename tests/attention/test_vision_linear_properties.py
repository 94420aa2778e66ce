"""What holds for the linear attentions of images whatever their weights, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import export_onnx
from grid_mixers import cells, close, make
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from effformer.attention import MLLA, RALA, Agent, Focused, Linear, PolaFormer
from effformer.build import build_model
from effformer.checks import CapabilityError
from effformer.context import Context, Tap
from effformer.nn.lepe import LePE
from effformer.nn.resample import averages, stretch, stretch_grid
from effformer.profile import Counter
from effformer.site import Site

KINDS = [MLLA, RALA, PolaFormer, Focused, Agent]
GRID = (3, 4)


def silent(part: Any) -> Any:
    """Without the convolution."""
    with torch.no_grad():
        part.lepe.conv.weight.zero_()
        part.lepe.conv.bias.zero_()
    return part


def heads_of(x: Tensor, heads: int = 2) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def linear_core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The registered core on sums; its eps is that of averages times the number of keys."""
    core = Linear(Linear.Config(eps=1e-6 * k.shape[1]), Site(dim=16, heads=2))
    return core(heads_of(q), heads_of(k), heads_of(v)).transpose(1, 2).flatten(2)


def test_mlla_without_convolution_and_rotation_is_the_linear_core() -> None:
    part, x = silent(make(MLLA, rope=False)), cells(GRID, batch=2)
    q, k = part.qk(x).chunk(2, dim=-1)
    close(part(x, Context(grid=GRID)), linear_core(q, k, x))


def test_rala_with_equal_weights_is_the_linear_core_behind_its_gate() -> None:
    part, x = silent(make(RALA, rope=False, weighted=False)), cells(GRID, batch=2)
    q, k, v, gate = part.qkvg(x).chunk(4, dim=-1)
    close(part(x, Context(grid=GRID)), part.proj(linear_core(q, k, v) * gate))


def test_key_weights_of_rala_have_mean_one() -> None:
    """Equal keys are weighted equally, so that weights change nothing."""
    x = cells(GRID)
    tap = Tap(edit=lambda _, k: k[:, :, :1].expand_as(k), at=("here.k",))
    outputs = [
        make(RALA, rope=False, weighted=weighted)(x, Context(grid=GRID, tap=tap))
        for weighted in (True, False)
    ]
    close(*outputs)


@pytest.mark.parametrize("kind", [MLLA, RALA])
def test_rotation_sees_differences_only(kind: Any) -> None:
    """Moving a whole image inside a larger grid of silent keys turns all its tokens alike."""
    part, tables = make(kind), []
    for grid in ((3, 4), (5, 6)):
        tables.append([t.unflatten(0, grid) for t in part.tables(grid, cells(GRID))])
    q, k = (
        cells((3, 4), dim=tables[0][0].shape[-1]).unflatten(1, GRID),
        cells((4, 3), dim=tables[0][0].shape[-1]).unflatten(1, GRID),
    )
    scores = []
    for cos, sin in (tables[0], [t[2:, 2:] for t in tables[1]]):
        turned = [
            t * cos + torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2) * sin
            for t in (q, k)
        ]
        scores.append(turned[0].flatten(1, 2) @ turned[1].flatten(1, 2).mT)
    close(*scores)


def test_negated_queries_of_polaformer_swap_the_roles_of_its_halves() -> None:
    part = make(PolaFormer)
    q, k, v = (heads_of(t) for t in cells(GRID, batch=3).split(1))
    swapped = torch.cat(v.chunk(2, dim=-1)[::-1], dim=-1)
    expected = torch.cat(part.polar(q, k, swapped).chunk(2, dim=-1)[::-1], dim=-1)
    close(part.polar(-q, k, v), expected)


def test_powers_of_polaformer_start_at_three_and_have_gradients_at_zero() -> None:
    part = PolaFormer(PolaFormer.Config(), Site(dim=16, heads=2)).double()
    q = torch.zeros(1, 2, 12, 8, dtype=torch.float64)
    q[..., 0] = torch.linspace(-1, 1, 12)
    q.requires_grad_()
    out = part.polar(q, q, torch.ones_like(q))
    t = heads_of(q.detach().transpose(1, 2).flatten(2)) / torch.log(
        torch.tensor(2.0, dtype=q.dtype)
    )
    positive, negative = F.relu(t) ** 3, F.relu(-t) ** 3
    features = torch.cat([positive, negative], dim=-1)
    total = (features * features.mean(dim=2, keepdim=True)).sum(-1, keepdim=True)
    close(out[..., :4], (total / (total + 1e-6)).expand(-1, -1, -1, 4))
    (out * torch.randn_like(out)).sum().backward()
    assert part.power.grad is not None
    assert q.grad is not None
    assert part.power.grad.isfinite().all()
    assert part.power.grad[:, :, 0].abs().min() > 0
    assert not part.power.grad[:, :, 1:].any()
    assert q.grad.isfinite().all()


def test_focused_features_keep_their_length() -> None:
    part, x = make(Focused), heads_of(cells(GRID))
    t = (F.relu(x) + 1e-6) / F.softplus(part.scale)
    close(part.focus(x).square().sum((1, 3)), t.square().sum((1, 3)))
    assert part.focus(x).amax(dim=(1, 3)).gt(t.amax(dim=(1, 3))).all()
    close(make(Focused, power=1).focus(x), t)


@pytest.mark.parametrize("power", [3.0, 12.0])
def test_focus_of_dead_rows_is_finite_in_single_precision(power: float) -> None:
    part = make(Focused, power=power).float()
    x = heads_of(torch.cat([-torch.ones(1, 2, 16), 1e6 * torch.ones(1, 2, 16)])).requires_grad_()
    out = part.focus(x)
    out.sum().backward()
    assert x.grad is not None
    for value in (out, x.grad, part.scale.grad):
        assert value.isfinite().all()
    assert out.amin() > 0


def test_as_many_agents_as_tokens_are_the_queries() -> None:
    part, x = silent(make(Agent, agents=9, bias="none")), cells((3, 3), batch=2)
    q, (k, v) = heads_of(part.q(x)), (heads_of(t) for t in part.kv(x).chunk(2, dim=-1))
    first, second = ((a @ b.mT * 8**-0.5).softmax(-1) for a, b in ((q, q), (q, k)))
    expected = part.proj((first @ second @ v).transpose(1, 2).flatten(2))
    close(part(x, Context(grid=(3, 3))), expected)


def test_weights_of_agents_sum_to_one() -> None:
    site = {"grid": GRID, "length": 13}
    part, x = silent(make(Agent, agents=4, site=site)), cells(GRID, front=1)
    tap = Tap(edit=lambda _, v: v[:, :, :1].expand_as(v), at=("here.v",), keep=("here.v",))
    out = part(x, Context(grid=GRID, tap=tap))
    close(out, part.proj(tap.seen["here.v"].transpose(1, 2).flatten(2)))


def test_front_biases_are_for_one_number_of_tokens() -> None:
    part = make(Agent, agents=4, site={"grid": GRID, "length": 13})
    with pytest.raises(ValueError, match="agent: biases for 1 tokens in front of the grid, got 2"):
        part(cells(GRID, front=2), Context(grid=GRID))


@pytest.mark.parametrize("channels", [8, 16])
def test_convolution_of_values_is_translation_equivariant_inside(channels: int) -> None:
    lepe = LePE(channels, 3).double()
    image = cells((7, 7)).unflatten(1, (7, 7))
    moved = image.roll((1, 2), dims=(1, 2))
    first, second = (lepe(x.flatten(1, 2), (7, 7)).unflatten(1, (7, 7)) for x in (image, moved))
    close(second[:, 2:-1, 3:-1], first[:, 1:-2, 1:-3])


def test_resampling_is_that_of_torch() -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    for grid in ((5, 6), (7, 7), (3, 2), (1, 11), (12, 4)):
        close(stretch_grid(x, grid, 2), F.interpolate(x, size=grid, mode="bilinear"))
        pooled = averages(5, grid[0], x) @ x @ averages(6, grid[1], x).mT
        close(pooled, F.adaptive_avg_pool2d(x, grid))
    line = x.flatten(2)
    close(stretch(line, 47, 2), F.interpolate(line, size=47, mode="linear"))
    torch.testing.assert_close(stretch(line, 30, 2), line, rtol=0, atol=0)


class _Largest(TorchDispatchMode):
    """The largest tensor that an operator makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_work_and_memory_grow_with_the_number_of_tokens(kind: Any) -> None:
    part = make(
        kind, site={"grid": (8, 8), "length": 64}, **({"agents": 4} if kind is Agent else {})
    )
    sizes = []
    for grid in ((16, 16), (32, 32)):
        with _Largest() as largest, torch.no_grad():
            part(cells(grid), Context(grid=grid))
        sizes.append(largest.numbers)
    assert sizes[1] <= 4 * sizes[0]
    assert sizes[1] < 1024**2
    assert part.macs(1024, grid=(32, 32)) <= 4 * part.macs(256, grid=(16, 16))


@pytest.mark.parametrize("kind", [PolaFormer, Focused, Agent])
@pytest.mark.parametrize("grid", [(4, 4), (5, 7)])
def test_macs_with_reduction(kind: Any, grid: tuple[int, int]) -> None:
    part, x = make(kind, reduction=2), cells(grid, batch=3)
    counts = []
    for batch in (x, x[:2]):
        with Counter(part) as counter:
            part(batch, Context(grid=grid))
        counts.append(sum(tally.macs for tally in counter.rows.values()))
    assert counts[0] - counts[1] == part.macs(x.shape[1], grid=grid)
    with pytest.raises(ValueError, match="reduction=2 leaves no key of a grid"):
        part.macs(16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_features_and_sums_in_single(kind: Any, dtype: torch.dtype) -> None:
    """With large tokens, powers and sums over 1,024 keys lie far beyond float16."""
    part, grid = make(kind, std=0.2), (32, 32)
    x = (20 if kind in (PolaFormer, Focused) else 2) * cells(grid)
    with torch.no_grad():
        exact = part(x, Context(grid=grid))
        half = part.to(dtype)(x.to(dtype), Context(grid=grid))
    assert half.dtype == dtype
    error = (half.double() - exact).abs().mean() / exact.abs().mean()
    assert error < 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_the_normaliser_in_single(kind: Any) -> None:
    part, x = make(kind).float(), cells(GRID).float()
    expected = part(x, Context(grid=GRID))
    with torch.autocast("cpu", torch.bfloat16):
        out = part(x, Context(grid=GRID))
    torch.testing.assert_close(
        out.float(), expected, rtol=0, atol=0.05 * float(expected.detach().abs().max())
    )


class _OnImages(nn.Module):
    """A mixer on images of any size."""

    def __init__(self, part: nn.Module, front: int) -> None:
        super().__init__()
        self.part, self.front = part, front

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        x = image.flatten(2).transpose(1, 2)
        x = torch.cat([x[:, : self.front] + 1, x], dim=1)
        return self.part(x, Context(grid=(height, width)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "knobs", "front"),
    [
        (MLLA, {}, 0),
        (RALA, {}, 0),
        *((kind, {"reduction": 2}, 0) for kind in (PolaFormer, Focused)),
        (Agent, {"agents": 9, "reduction": 2}, 1),
    ],
)
def test_one_graph_serves_every_grid(
    kind: Any, knobs: dict[str, Any], front: int, tmp_path: Path
) -> None:
    part = make(kind, site={"grid": (6, 8), "length": 48 + front}, **knobs).float().eval()
    image = cells((6, 8), batch=2).float().mT.unflatten(2, (6, 8)).contiguous()
    axes = {0: "batch", 2: "height", 3: "width"}
    report = export_onnx(
        _OnImages(part, front), tmp_path / "part.onnx", (image,), dynamic={"image": axes}
    )
    assert report.parity is not None
    assert report.parity.passed
    assert len({case.shapes["image"][2:] for case in report.parity.cases}) >= 3


@pytest.mark.parametrize("kind", [PolaFormer, Focused, Agent])
def test_tables_and_reduction_compile_without_graph_breaks(kind: Any) -> None:
    part = make(kind, site={"grid": (4, 4), "length": 16}, reduction=2)
    torch.compiler.reset()
    compiled = torch.compile(part, fullgraph=True, backend="eager")
    x, ctx = cells((6, 2)), Context(grid=(6, 2))
    close(compiled(x, ctx), part(x, ctx))


@pytest.mark.parametrize("kind", KINDS)
def test_taps_read_and_replace(kind: Any) -> None:
    part, x = make(kind), cells(GRID, batch=2)
    tap = Tap(keep=("here.*",))
    close(part(x, Context(grid=GRID, tap=tap)), part(x, Context(grid=GRID)))
    assert {name: value.shape for name, value in tap.seen.items()} == {
        f"here.{name}": (2, 2, 12, 8) for name in "qkv"
    }
    zero = Tap(edit=lambda _, v: torch.zeros_like(v), at=("here.v",))
    without = silent(part)(x, Context(grid=GRID, tap=zero))
    assert not (without - without[:, :1]).any()


@pytest.mark.parametrize(
    ("kind", "site", "reason"),
    [
        (MLLA, {"dim": 18, "heads": 3}, "rotates quarters of the width, which 18 has not"),
        (MLLA, {"out_dim": 8}, "keeps the width of tokens, 16"),
        (RALA, {"dim": 12}, "rotates quarters of a head, which the width 6 has not"),
        (PolaFormer, {"dim": 18, "heads": 6}, "18 channels into 6 heads and 2 channels of each"),
        (Focused, {"heads": 3}, "cannot cut 16 channels into 3 heads"),
    ],
)
def test_widths_that_do_not_fit_are_refused(kind: Any, site: dict[str, Any], reason: str) -> None:
    with pytest.raises(CapabilityError, match=rf"here: '\w+' .*{reason}; choices: softmax"):
        make(kind, site=site)


@pytest.mark.parametrize("kind", KINDS)
def test_other_places_are_refused(kind: Any) -> None:
    part = make(kind)
    for grid in (None, (12,)):
        with pytest.raises(CapabilityError, match=r"needs ctx\.grid with rows and columns"):
            part(cells(GRID), Context(grid=grid))
    with pytest.raises(ValueError, match=r"here: 12 tokens do not fill the grid \(4, 4\)"):
        part(cells(GRID), Context(grid=(4, 4)))
    grid = (2, 2, 3) if kind is Agent else GRID
    with pytest.raises(CapabilityError, match="no place for the 1 tokens in front of"):
        part(cells(grid, front=1), Context(grid=grid))
    with pytest.raises(CapabilityError, match="mask"):
        part(cells(GRID), Context(grid=GRID, mask=torch.ones(1, 12, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("kind", "knobs", "message"),
    [
        (Agent, {"agents": 8}, "agent: agents must be a square number, got 8"),
        (Agent, {"reduction": 0}, "reduction must be at least 1, got 0"),
        (PolaFormer, {"alpha": 0.0}, "alpha must be positive"),
        (Focused, {"power": 0.0}, "power must be positive"),
        (MLLA, {"kernel": 4}, "kernel must be one of 1, 3, 5, ..., got 4"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    kind: Any, knobs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, **knobs)


def test_a_model_runs_at_another_resolution_than_it_was_built_for() -> None:
    model = build_model("dit-nano", input_size=16, attn={"name": "polaformer", "reduction": 2})
    inputs = model.example_inputs(2)
    wide = F.pad(inputs["x"], (0, 8))
    assert model(**{**inputs, "x": wide}).shape[-1] == wide.shape[-1]
