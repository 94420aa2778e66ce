"""The noise of a page (`normal` of its bundle.js), in numpy."""

from __future__ import annotations

import numpy as np

__all__ = ["normal"]


def normal(seed: int, count: int) -> np.ndarray:
    """Standard normal numbers (count,) float32."""
    index, odd = np.arange(1, count + count % 2 + 1, dtype=np.uint64), np.uint64(0x6D2B79F5)
    low = np.uint64(0xFFFFFFFF)
    state = (np.uint64(seed) + index * odd) & low
    z = ((state ^ (state >> np.uint64(15))) * (state | np.uint64(1))) & low
    z ^= (z + (((z ^ (z >> np.uint64(7))) * (z | np.uint64(61))) & low)) & low
    u = (z ^ (z >> np.uint64(14))) / 2.0**32
    radius, angle = np.sqrt(-2 * np.log(1 - u[::2])), 2 * np.pi * u[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.ravel()[:count].astype(np.float32)
