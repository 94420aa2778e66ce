"""SiT: the DiT network under rectified flow and other interpolants.

Reference: SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers, 2024, arXiv 2401.08740.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effformer.context import Ledger, Tap

from .base import register_presets
from .dit import DiT, dit_presets

__all__ = ["PRESETS", "SiT"]


class SiT(DiT):
    """Scalable interpolant transformer: `DiT` with time in [0, 1] (0 noise, 1 data) and the
    velocity as output.

    Args:
        config: the config.
        name: preset name.

    Reference: SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
    Transformers, 2024, arXiv 2401.08740.
    """

    FAMILY: ClassVar[str] = "sit"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(DiT.Config):
        """Knobs of `SiT`: those of `DiT`.

        With ``learn_sigma``, as in the released weights, the second half of the output channels is
        thrown away.
        """

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        drop: Tensor | None = None,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """Predict the velocity (B, C, H, W); arguments as `DiT.forward`, t in [0, 1]."""
        out = super().forward(x, t, y, drop=drop, ledger=ledger, tap=tap)
        return out[:, : self.config.channels]

    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        inputs = super().example_inputs(batch, generator=generator)
        x = inputs["x"]
        inputs["t"] = torch.rand(batch, dtype=x.dtype, device=x.device, generator=generator)
        return inputs


PRESETS = dit_presets(SiT.Config, "sit", "SiT", "arXiv 2401.08740, same sizes as DiT")
register_presets(SiT, PRESETS, paper="2401.08740")
