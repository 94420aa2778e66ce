"""Linear attention without a normaliser whose memory fades at a constant rate per head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from effformer.registry import core
from effformer.site import Site

from .gated import GATED_CAPS, GatedConfig, GatedCore, Terms

__all__ = ["Lightning", "Retention"]

_HEADS = {
    "qkv_bias": False, "proj_bias": False, "gate": {"act": "silu", "norm": "head"},
}  # fmt: skip


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

    PER_HEAD = ("head",)
    head: Tensor

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(GatedConfig):
        """Knobs of `Retention`.

        Attributes:
            rates: "retnet" as above, or "lightning": ``g_h = exp(-(8 h / H)(1 - layer / depth))``.
        """

        rates: Literal["retnet", "lightning"] = "retnet"

    def __init__(self, config: Retention.Config, site: Site) -> None:
        super().__init__(config, site)
        # whole numbers stay exact in a model of half precision
        self.register_buffer("head", torch.arange(site.heads), persistent=False)
        self.numbers = tuple(range(site.heads))

    def reset_buffers(self) -> None:
        """Number the heads again."""
        self.head = torch.tensor(self.numbers, device=self.head.device)

    def select(self, heads: Tensor) -> GatedCore:
        small = super().select(heads)
        assert isinstance(small, Retention)
        small.numbers = tuple(self.numbers[i] for i in heads.tolist())
        return small

    def terms(self, q: Tensor, k: Tensor, v: Tensor, **further: Tensor) -> Terms:
        head, site = self.head.to(torch.promote_types(v.dtype, torch.float32)), self.site
        if self.config.rates == "retnet":
            return Terms(q, k, v, torch.log1p(-(2.0 ** (-5.0 - head))))
        return Terms(q, k, v, -8 / site.heads * (1 - site.layer / max(site.depth, 1)) * head)


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
