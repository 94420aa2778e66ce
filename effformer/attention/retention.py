"""Linear attention without a normaliser whose memory fades at a constant rate per head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from effformer.registry import core
from effformer.site import Site

from .gated import GATED_CAPS, GatedConfig, GatedCore, Terms
from .gated_scan import retention_decay

__all__ = ["Lightning", "Retention"]

_HEADS = {
    "qkv_bias": False, "proj_bias": False, "gate": {"act": "silu", "norm": "head"},
}  # fmt: skip


def fades(kind: str, site: Site) -> Tensor:
    """Log decays of the heads, (H,)."""
    if kind == "retnet":
        return retention_decay(site.heads).float()
    rate = 8 / site.heads * (1 - site.layer / max(site.depth, 1))
    return -rate * torch.arange(site.heads, dtype=torch.float32)


@core.register(
    "retention",
    caps=replace(GATED_CAPS, rope=True),
    paper="2307.08621",
    heads=_HEADS,
)
class Retention(GatedCore):
    """Retention: ``o_i = K^-1/2 sum_{j <= i} g_h^(i-j) (q_i . k_j) v_j`` with ``g_h = 1 - 2^(-5-h)``.

    Rotary positions turn queries and keys. The heads around it have a norm of each head's output and
    a SiLU gate, as published; values are as wide as keys unless ``value_dim`` says otherwise (twice
    as wide in the paper). There is no normaliser.

    Differs from the paper: two directions in models that attend both ways.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Retentive Network: A Successor to Transformer for Large Language Models, 2023, arXiv
    2307.08621.
    """

    PER_HEAD = ("decay",)
    decay: Tensor

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(GatedConfig):
        """Knobs of `Retention`.

        Attributes:
            rates: "retnet" as above, or "lightning": ``g_h = exp(-(8 h / H)(1 - layer / depth))``.
        """

        rates: Literal["retnet", "lightning"] = "retnet"

    def __init__(self, config: Retention.Config, site: Site) -> None:
        super().__init__(config, site)
        self.register_buffer("decay", fades(config.rates, site), persistent=False)

    def terms(self, q: Tensor, k: Tensor, v: Tensor, **further: Tensor) -> Terms:
        return Terms(q, k, v, self.decay)


@core.register("lightning", caps=GATED_CAPS, paper="2401.04658", heads=_HEADS)
class Lightning(Retention):
    """Lightning attention: `Retention` whose rates depend on the layer,
    ``g_h = exp(-(8 h / H)(1 - layer / depth))``; the first head forgets nothing.

    Differs from the paper: a norm of each head's output instead of one over all; two directions in
    models that attend both ways.

    Args:
        config: the knobs.
        site: the place in the model; its layer and depth set the rates.

    Reference: Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large
    Language Models, 2024, arXiv 2401.04658.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Retention.Config):
        """Knobs of `Lightning`; see `Retention`."""

        rates: Literal["retnet", "lightning"] = "lightning"
