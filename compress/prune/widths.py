"""Sizes of sub-networks as DynaBERT rounds them."""

from __future__ import annotations

__all__ = ["dyna_layers", "dyna_widths"]


def dyna_widths(dim: int, hidden: int, heads: int, share: float) -> tuple[int, int, int]:
    """Channels of all heads together, hidden channels and heads of a width multiplier: with h = the
    rounded number of heads, ``int(h / heads * size)``.

    Reference: DynaBERT: Dynamic BERT with Adaptive Width and Depth, 2020, arXiv 2004.04037.

    Example:
        >>> dyna_widths(768, 3072, 12, 0.25)
        (192, 768, 3)
    """
    left = round(heads * share)
    return int(left * dim / heads), int(left * hidden / heads), left


def dyna_layers(depth: int, share: float) -> list[int]:
    """The layers that a depth multiplier keeps: ``floor(i / share)``.

    Example:
        >>> dyna_layers(12, 0.5)
        [0, 2, 4, 6, 8, 10]
    """
    return [int(i / share) for i in range(round(depth * share))]
