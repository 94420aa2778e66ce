"""Schedules: strings that say along which axes of a grid the token mixer of each block acts."""

from __future__ import annotations

from collections.abc import Sequence

from effformer.attention import Axes, View
from effformer.checks import CapabilityError
from effformer.config import Config

__all__ = ["along_axes", "axes_of"]


def axes_of(schedule: str, depth: int, grid: str, *, where: str) -> list[str]:
    """The axes of every block, as letters of the grid: ``axes_of("ts", 4, "thw")`` is t, hw, t, hw.

    Args:
        schedule: one letter a block, in either case, repeated to the depth: an axis of the grid,
            "s" for all of them but t, "f" for all.
        depth: number of blocks.
        grid: axes of the grid, "thw" or its last letters.
        where: prefix of messages.

    Raises:
        ValueError: a letter without a meaning, or a schedule whose length does not divide the
            depth.
        CapabilityError: an axis that the grid has not.

    Reference: PredFormer: Transformers Are Effective Spatial-Temporal Predictive Learners, 2024,
    arXiv 2410.04733.
    """
    known = {"t": "t", "h": "h", "w": "w", "s": grid.replace("t", ""), "f": grid}
    letters = schedule.lower()
    for letter in letters:
        if letter not in known:
            raise ValueError(
                f"{where}: {letter!r} in {schedule!r} is no axis; choices: t, h, w, "
                "s (space), f (the full grid)"
            )
        if not grid or not set(known[letter]) <= set(grid):
            has = f"has only {', '.join(grid)}" if grid else "has no grid of tokens"
            raise CapabilityError(f"{where}: {letter!r} in {schedule!r}: this model {has}")
    if not letters or depth % len(letters):
        raise ValueError(
            f"{where}: the {len(letters)} letters of {schedule!r} do not divide {depth} blocks"
        )
    return [known[letter] for letter in letters * (depth // len(letters))]


def along_axes(mixers: Sequence[Config], schedule: str, grid: str, name: str) -> list[Config]:
    """The mixers of a stack, each along the axes that the schedule gives its block; see `axes_of`.

    Raises:
        ValueError: a bad schedule.
        CapabilityError: an axis that the grid has not.
    """
    axes = axes_of(schedule, len(mixers), grid, where=f"{name} axes")
    return [
        mixer if over == grid or isinstance(mixer, View) else Axes.Config(over=over, mixer=mixer)
        for mixer, over in zip(mixers, axes, strict=True)
    ]
