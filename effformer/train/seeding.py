"""Randomness as a function of (seed, step), so that nothing random needs to be stored."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Order", "isolated_randomness", "seed_for"]


class Order:
    """Order of the data: one permutation per epoch, batches run on across epochs."""

    def __init__(self, samples: int, batch: int, seed: int) -> None:
        self.samples, self.batch, self.seed = samples, batch, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def rows(self, step: int) -> Tensor:
        """Indices (batch,) of a step, a function of (seed, step)."""
        first = step * self.batch
        pieces, missing = [], self.batch
        while missing:
            epoch, offset = divmod(first, self.samples)
            piece = self._of(epoch)[offset : offset + missing]
            pieces.append(piece)
            first, missing = first + len(piece), missing - len(piece)
        return torch.cat(pieces)

    def _of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_for(self.seed, "order", epoch))
            self._epoch, self._permutation = (
                epoch,
                torch.randperm(self.samples, generator=generator),
            )
        return self._permutation


def seed_for(*parts: object) -> int:
    """A seed per purpose and step: 32 bits, which is what torch's CPU generator keeps."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


@contextlib.contextmanager
def isolated_randomness(device: torch.device) -> Iterator[None]:
    """Leave torch's own generators as the caller had them."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
