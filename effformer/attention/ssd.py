"""The state space duality of Mamba-2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from effformer.nn.precision import widened
from effformer.registry import core
from effformer.site import Site
from effformer.values import NonNegative, Positive

from .decays import start_bias, start_rates, step_width
from .gated import GATED_CAPS, GatedConfig, GatedCore, Terms, wide
from .outputs import Input

__all__ = ["SSD"]

_HEADS = {
    "qkv_bias": False, "proj_bias": False, "short_conv": 4, "short_conv_bias": True,
    "gate": {"act": "silu", "norm": "groups", "first": True},
}  # fmt: skip


@core.register("ssd", caps=replace(GATED_CAPS, width=False), paper="2405.21060", heads=_HEADS)
class SSD(GatedCore):
    """Mamba-2's recurrence: ``S_t = a_t S_{t-1} + k_t (d_t v_t)^T``, ``o_t = S_t^T q_t + D v_t``, with
    ``d_t = softplus(w . x_t + c)`` and ``a_t = exp(-exp(A) d_t)``; q is C, k is B, v is x there.

    The heads around it have short convolutions with a bias, and a SiLU gate before a norm over
    groups of heads.

    Differs from the paper: as many heads for B and C as for x unless ``qk_heads`` says otherwise
    (one there); two directions in models that attend both ways.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
    State Space Duality, 2024, arXiv 2405.21060.
    """

    PER_HEAD = ("rate", "bias", "skip")
    scale = 1.0

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(GatedConfig):
        """Knobs of `SSD`.

        Attributes:
            least: smallest d.
            most: largest d, None for no bound.
        """

        least: NonNegative = 0.0
        most: Positive | None = None

        def check(self) -> None:
            if self.most is not None and not self.least < self.most:
                raise ValueError(f"ssd: least={self.least} is not below most={self.most}")

        def inputs(self, head_dim: int, value_dim: int) -> Mapping[str, Input]:
            return {"time": Input()}

    def __init__(self, config: SSD.Config, site: Site) -> None:
        super().__init__(config, site)
        self.rate = nn.Parameter(start_rates(site.heads, low=1.0))
        self.bias = nn.Parameter(start_bias(site.heads))
        self.skip = nn.Parameter(torch.ones(site.heads))

    def terms(self, q: Tensor, k: Tensor, v: Tensor, *, time: Tensor) -> Terms:  # type: ignore[override]
        d = step_width(wide(time) + self.bias[:, None]).clamp(self.config.least, self.config.most)
        return Terms(q, k, widened(v) * d[..., None], -widened(self.rate).exp()[:, None] * d)

    def leave(self, out: Tensor, v: Tensor) -> Tensor:
        return out + widened(self.skip)[:, None, None] * v
