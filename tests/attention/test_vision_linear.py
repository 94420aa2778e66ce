"""The linear attentions of images against their definitions, forward and backward, on any grid."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from grid_mixers import cells, close, make
from torch import Tensor

from effformer.attention import MLLA, RALA, Agent, Focused, PolaFormer
from effformer.attention.lin import GridMixer
from effformer.attention.reference_vision import (
    agent_reference,
    focused_reference,
    mlla_reference,
    polaformer_reference,
    rala_reference,
)
from effformer.context import Context

REFERENCES = {
    MLLA: mlla_reference, RALA: rala_reference, PolaFormer: polaformer_reference,
    Focused: focused_reference, Agent: agent_reference,
}  # fmt: skip
Grid = tuple[int, int]


def slow(part: GridMixer, x: Tensor, grid: Grid, **options: Any) -> Tensor:
    """The reference on every image, with the parameters themselves, so that it has gradients."""
    weights = dict(part.named_parameters())
    run = partial(REFERENCES[type(part)], w=weights, grid=grid, heads=part.heads, **options)
    return torch.stack([run(image) for image in x])


def assert_equal(part: GridMixer, x: Tensor, grid: Grid, **options: Any) -> None:
    """Outputs, and gradients of the tokens and of every parameter."""
    x = x.requires_grad_()
    fast, expected = part(x, Context(grid=grid)), slow(part, x, grid, **options)
    close(fast, expected)
    weight, inputs = torch.randn_like(fast), [x, *part.parameters()]
    found = torch.autograd.grad((fast * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    largest = max(float(g.abs().max()) for g in wanted)  # some are 0: a softmax over one row
    for one, other in zip(found, wanted, strict=True):
        close(one, other, largest)


@pytest.mark.parametrize("grid", [(2, 3), (3, 3), (1, 5)])
@pytest.mark.parametrize("kind", [MLLA, RALA, PolaFormer, Focused])
def test_linear_forms(kind: Any, grid: Grid) -> None:
    assert_equal(make(kind), cells(grid, batch=2), grid)


@pytest.mark.parametrize("heads", [1, 4])
def test_rotation_over_the_whole_width_and_over_narrow_heads(heads: int) -> None:
    site = {"heads": heads}  # with four, heads of four channels: one frequency an axis
    for kind in (MLLA, RALA):
        assert_equal(make(kind, site=site), cells((3, 2)), (3, 2))


def test_pairs_of_the_whole_width_lie_across_odd_heads() -> None:
    part = make(MLLA, site={"dim": 12, "heads": 4})
    x = cells((2, 3), dim=12)
    cos, sin = part.tables((2, 3), x)
    q, k = torch.nn.functional.elu(part.qk(x)).add(1).chunk(2, dim=-1)
    weights = []
    for t in (q, k):
        turned = torch.stack([-t[..., 1::2], t[..., ::2]], dim=-1).flatten(-2)
        weights.append((t * cos + turned * sin).unflatten(-1, (4, 3)).transpose(1, 2))
    top = weights[0] @ weights[1].mT / 6
    split = (t.unflatten(-1, (4, 3)).transpose(1, 2) for t in (q, k))
    bottom = (next(split) * next(split).mean(dim=2, keepdim=True)).sum(-1, keepdim=True) + 1e-6
    mixed = top / bottom @ x.unflatten(-1, (4, 3)).transpose(1, 2)
    expected = mixed.transpose(1, 2).flatten(2) + part.lepe(x, (2, 3))
    close(part(x, Context(grid=(2, 3))), expected)


@pytest.mark.parametrize("kind", [PolaFormer, Focused])
@pytest.mark.parametrize("grid", [(4, 2), (5, 6)])
def test_reduction_and_codes(kind: Any, grid: Grid) -> None:
    part = make(kind, site={"grid": grid, "length": grid[0] * grid[1]}, reduction=2)
    assert part.positions is not None
    assert part.positions.grid == (grid[0] // 2, grid[1] // 2)
    assert_equal(part, cells(grid), grid, reduction=2)


@pytest.mark.parametrize(
    ("kind", "name", "value"), [(PolaFormer, "alpha", 2.5), (Focused, "power", 2)]
)
def test_powers(kind: Any, name: str, value: float) -> None:
    assert_equal(make(kind, **{name: value}), cells((2, 3)), (2, 3), **{name: value})


@pytest.mark.parametrize("bias", ["none", "maps", "full"])
@pytest.mark.parametrize("front", [0, 1, 3])
def test_agent_with_tokens_in_front(bias: str, front: int) -> None:
    grid = (3, 5)
    part = make(Agent, site={"grid": grid, "length": front + 15}, agents=4, bias=bias)
    assert_equal(part, cells(grid, batch=2, front=front), grid, agents=4, front=front)


@pytest.mark.parametrize("front", [0, 1])
@pytest.mark.parametrize("grid", [(4, 4), (5, 7)])
def test_agent_with_reduction(grid: Grid, front: int) -> None:
    n = front + grid[0] * grid[1]
    part = make(Agent, site={"grid": grid, "length": n}, agents=9, reduction=2)
    x = cells(grid, front=front)
    assert_equal(part, x, grid, agents=9, front=front, reduction=2)


@pytest.mark.parametrize("front", [0, 2])
def test_agents_more_than_cells(front: int) -> None:
    part = make(Agent, agents=9)
    assert_equal(part, cells((1, 2), front=front), (1, 2), agents=9, front=front)


def test_without_biases_of_projections() -> None:
    for kind, knobs in ((RALA, {}), (PolaFormer, {}), (Focused, {}), (Agent, {"agents": 4})):
        part = make(kind, qkv_bias=False, proj_bias=False, **knobs)
        assert not any(name.endswith("proj.bias") for name, _ in part.named_parameters())
        assert_equal(part, cells((2, 3)), (2, 3), **knobs)
    assert_equal(make(MLLA, qk_bias=False), cells((2, 3)), (2, 3))


@pytest.mark.parametrize("kind", [MLLA, RALA, PolaFormer, Focused, Agent])
def test_frames_are_mixed_one_by_one(kind: Any) -> None:
    part, grid = make(kind), (3, 2, 4)
    x = cells(grid, batch=2)
    frames = [part(frame, Context(grid=(2, 4))) for frame in x.split(8, dim=1)]
    close(part(x, Context(grid=grid)), torch.cat(frames, dim=1))
    assert part.macs(24, grid=grid) == 3 * part.macs(8, grid=(2, 4))


@pytest.mark.parametrize(
    ("kind", "knobs", "options"),
    [
        (PolaFormer, {}, {}),
        (Focused, {"reduction": 2}, {"reduction": 2}),
        (Agent, {"agents": 4}, {"agents": 4}),
        (Agent, {"agents": 4, "reduction": 2}, {"agents": 4, "reduction": 2}),
    ],
)
@pytest.mark.parametrize("other", [(2, 6), (5, 3)])
def test_learned_positions_serve_other_grids(
    kind: Any, knobs: dict[str, Any], options: dict[str, Any], other: Grid
) -> None:
    """Agents interpolate in the reference; tables of codes are interpolated here by torch."""
    part = make(kind, site={"grid": (4, 4), "length": 16}, **knobs)
    x = cells(other)
    if kind is Agent:
        assert_equal(part, x, other, **options)
        return
    side = knobs.get("reduction", 1)
    image = part.positions.table.mT.unflatten(2, part.positions.grid)
    size = (other[0] // side, other[1] // side)
    resized = torch.nn.functional.interpolate(image, size=size, mode="bilinear").flatten(2).mT
    weights = dict(part.named_parameters()) | {"positions.table": resized}
    expected = REFERENCES[kind](x[0], weights, other, heads=2, **options)
    close(part(x, Context(grid=other))[0], expected)
