"""Rotary tables over three coordinates with given widths."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_close
from torch import Tensor
from torch._dynamo.utils import counters

from effformer.nn.rope import GridRope
from effformer.places import Rope


def test_every_coordinate_turns_its_own_channels() -> None:
    rope = GridRope(
        GridRope.Config(temperature=1e4, widths=(4, 6, 6)), 16, heads=1, depth=1, axes=3
    )
    places = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 3, 0], [0, 0, 7]]])
    (table,) = rope(places, like=torch.zeros(1))
    for token, (axis, value) in enumerate([(0, 0), (0, 1), (1, 3), (2, 7)]):
        angles = torch.zeros(8)
        start, width = [(0, 4), (2, 6), (5, 6)][axis]
        for k in range(width // 2):
            angles[start + k] = value * math.pow(1e4, -2 * k / width)
        wide = angles.repeat_interleave(2)
        torch.testing.assert_close(table.cos[token], wide.cos())
        torch.testing.assert_close(table.sin[token], wide.sin())


def test_scores_hang_on_differences_of_places() -> None:
    rope = GridRope(GridRope.Config(widths=(4, 6, 6)), 16, heads=1, depth=1, axes=3)
    places, x = torch.randn(1, 5, 3), torch.randn(1, 1, 5, 16)
    (here,), (there,) = (rope(p, like=x) for p in (places, places + torch.tensor([1.0, 2, 3])))
    scores = [(r.query(x) @ r.key(x).mT) for r in (here, there)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "axes", "match"),
    [
        ({"widths": (4, 6, 8)}, 3, r"\(4, 6, 8\) are those of 3 .* width 18, but here are 3 .* 16"),
        ({"widths": (8, 8)}, 3, "those of 2 coordinates"),
        ({"kind": "mixed", "widths": (8, 8)}, 2, "widths=None"),
        ({"widths": (5, 6, 5)}, 3, "widths"),
        ({"reference": (4, 4)}, 3, "two axes, not 3"),
    ],
)
def test_widths_that_do_not_fit_are_refused(options: dict, axes: int, match: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=match):
        GridRope(GridRope.Config(**options), 16, heads=1, depth=1, axes=axes)


def test_one_compiled_graph_serves_every_slice_of_the_tables() -> None:
    def turned(text: Tensor, table: Tensor) -> Tensor:
        rows = slice(text.shape[1], None)
        return Rope(table, table, interleaved=False).tokens(rows).query(table[:, :, rows])

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(turned, fullgraph=True, dynamic=True, backend="eager")
    for n in (6, 3, 12):
        text, table = torch.randn(2, n, 5), torch.randn(1, 1, n + 20, 4)
        assert_close(compiled(text, table), turned(text, table), rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
