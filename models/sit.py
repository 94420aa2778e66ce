"""SiT: the DiT network under rectified flow and other interpolants.

Reference: SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers, 2024, arXiv 2401.08740.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effformer.context import Context

from .base import register_presets
from .dit import DiT, dit_presets

__all__ = ["PRESETS", "SiT"]


class SiT(DiT):
    """Scalable interpolant transformer: `DiT` with time in [0, 1] (0 noise, 1 data) and the
    velocity as output: ``forward(x, t, y)`` with t in [0, 1] returns (B, C, H, W).

    Args:
        config: the config.
        name: preset name.

    Reference: SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
    Transformers, 2024, arXiv 2401.08740.
    """

    FAMILY: ClassVar[str] = "sit"
    CONVENTION: ClassVar[str | None] = "sit"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(DiT.Config):
        """Knobs of `SiT`: those of `DiT`.

        With ``learn_sigma``, as in the released weights, the second half of the output channels is
        thrown away.
        """

    def head(self, h: Tensor, ctx: Context) -> Tensor:
        """The velocity (B, C, H, W) from the tokens behind the last block."""
        return super().head(h, ctx)[:, : self.config.channels]

    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        inputs = super().example_inputs(batch, generator=generator)
        x = inputs["x"]
        inputs["t"] = torch.rand(batch, dtype=x.dtype, device=x.device, generator=generator)
        return inputs


PRESETS = dit_presets(SiT.Config, "sit", "SiT", "arXiv 2401.08740, same sizes as DiT")
register_presets(SiT, PRESETS, paper="2401.08740")
