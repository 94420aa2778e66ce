"""Positions of several videos that are not aligned."""

from __future__ import annotations

import pytest
import torch

from effformer.nn.positions import extended_positions


@pytest.mark.parametrize("axis", ["h", "w"])
def test_videos_share_their_times_and_no_place(axis: str) -> None:
    grid, along = (3, 2, 4), {"h": 1, "w": 2}[axis]
    plain = extended_positions(grid)
    three = extended_positions(grid, 3, axis=axis)  # type: ignore[arg-type]
    assert three.shape == (1, 3 * 24, 3)
    assert len(three[0].unique(dim=0)) == 3 * 24
    for i, places in enumerate(three[0].chunk(3)):
        moved = plain[0].clone()
        moved[:, along] += i * grid[along]
        assert torch.equal(places, moved)


def test_the_released_order_halves_the_times_of_the_first_video() -> None:
    paper, release = (
        extended_positions((4, 2, 3), 2, order=order)[0].unflatten(0, (2, 4, 6))
        for order in ("paper", "release")
    )
    assert paper[0, :, 0, 0].tolist() == [0, 1, 2, 3]
    assert release[0, :, 0, 0].tolist() == [0, 0, 1, 1]
    assert release[0, :, 0, 1].tolist() == [0, 2, 0, 2]
    assert len(release.flatten(0, 2).unique(dim=0)) == 48


def test_other_sizes_are_stretched_to_the_base_and_centred() -> None:
    small = extended_positions((1, 2, 4), base=(4, 8))[0]
    assert small[:, 1].unique().tolist() == [0, 2]
    assert small[:, 2].unique().tolist() == [0, 2, 4, 6]
    tall = extended_positions((1, 4, 4), base=(4, 8))[0]
    assert tall[:, 1].unique().tolist() == [0, 1, 2, 3]
    assert tall[:, 2].unique().tolist() == [2, 3, 4, 5]
    two = extended_positions((1, 2, 4), 2, base=(4, 8))[0]
    assert torch.equal(two[:8], small)
    assert two[8:, 1].unique().tolist() == [4, 6]
