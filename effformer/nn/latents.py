"""Distributions of latents of autoencoders."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from .precision import widened

__all__ = ["Latents"]


class Latents(NamedTuple):
    """A normal distribution of latents: ``mean + exp(logvar / 2) noise``.

    Attributes:
        mean: (B, M, C).
        logvar: (B, M, C) in [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> Self:
        """From mean and log-variance side by side (B, M, 2 C)."""
        mean, logvar = moments.chunk(2, dim=-1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def at(self, noise: Tensor) -> Tensor:
        """The latents that this noise (B, M, C) stands for."""
        return self.mean + (self.logvar / 2).exp() * noise

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents (B, M, C)."""
        like = self.mean
        return self.at(
            torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        )

    def kl(self) -> Tensor:
        """Divergence from the standard normal distribution (B,), the sum over all numbers."""
        mean, logvar = widened(self.mean), widened(self.logvar)
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1)
