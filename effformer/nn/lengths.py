"""Lengths that a graph may leave open."""

from __future__ import annotations

__all__ = ["is_fixed"]


def is_fixed(length: int) -> bool:
    """Whether a length is a number: a graph that is captured for every length has none there."""
    # here, because it loads sympy, which nothing that only runs a model needs
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(length)
