"""Positions of tokens as vectors, under padding on either side."""

from __future__ import annotations

import pytest
import torch

from effformer.nn.text import LearnedPositions, SinusoidalPositions, make_positions, sinusoids

MASKS = {
    "left": torch.tensor([[False, False, True, True], [True] * 4]),
    "right": torch.tensor([[True, True, False, False], [True] * 4]),
}
PLACES = {"left": [[-1, -1, 0, 1], [0, 1, 2, 3]], "right": [[0, 1, -1, -1], [0, 1, 2, 3]]}


@pytest.mark.parametrize("pad", [0, 1, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_from_the_number_behind_padding(side: str, pad: int) -> None:
    waves = make_positions("sinusoidal", 9, context=4, pad=pad, padding=side)
    table = make_positions("learned", 9, context=4, pad=pad, padding=side)
    assert isinstance(waves, SinusoidalPositions)
    assert isinstance(table, LearnedPositions)
    torch.nn.init.normal_(table.weight)
    codes, rows = waves(MASKS[side]), table(MASKS[side])
    for b, places in enumerate(PLACES[side]):
        for n, place in enumerate(places):
            row = pad if place < 0 else place + pad + 1
            wave = torch.zeros(9) if place < 0 else sinusoids(torch.tensor(row), 9)
            torch.testing.assert_close(codes[b, n], wave)
            torch.testing.assert_close(rows[b, n], table.weight[row])
    assert table.weight.shape == (4 + pad + 1, 9)


def test_padding_is_not_learned() -> None:
    table = LearnedPositions(4, context=4, pad=1, padding="left")
    table(MASKS["left"]).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.any(dim=1).tolist() == [False, False, True, True, True, True]


def test_none_and_too_many() -> None:
    assert make_positions("none", 4, context=4, pad=1, padding="left") is None
    with pytest.raises(ValueError, match="4 tokens, but positions for 3 only; cut the sequence"):
        LearnedPositions(4, context=3, pad=1, padding="left")(MASKS["left"])
