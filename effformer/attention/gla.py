"""Gated linear attention: the memory fades as the tokens say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from effformer.nn.precision import widened
from effformer.registry import core
from effformer.values import Count, Positive

from .gated import GATED_CAPS, GatedConfig, GatedCore, Terms, wide
from .outputs import Input

__all__ = ["GLA", "SimpleGLA"]

_HEADS = {
    "qkv_bias": False, "proj_bias": False, "gate": {"act": "silu", "norm": "head"},
}  # fmt: skip


@core.register("gla", caps=GATED_CAPS, paper="2312.06635", heads=_HEADS)
class GLA(GatedCore):
    """Gated linear attention: ``S_t = diag(a_t) S_{t-1} + k_t v_t^T``, ``o_t = K^-1/2 S_t^T q_t``,
    with ``a_t = sigmoid(W2 W1 x_t + b)^(1/16)`` for every key channel.

    The heads around it have a norm of each head's output and a SiLU gate.

    Differs from the paper: keys are as wide as values (there half as wide); two directions in models
    that attend both ways.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Gated Linear Attention Transformers with Hardware-Efficient Training, 2023, arXiv
    2312.06635.
    """

    PER_CHANNEL: ClassVar[bool] = True

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(GatedConfig):
        """Knobs of `GLA`.

        Attributes:
            rank: width of the bottleneck of the decays.
            slowness: the decay is a sigmoid to the power of one over this.
        """

        rank: Count = 16
        slowness: Positive = 16.0

        def inputs(self, head_dim: int, value_dim: int) -> Mapping[str, Input]:
            return {"decay": Input(head_dim, rank=self.rank, bias=True)}

    def terms(self, q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor) -> Terms:  # type: ignore[override]
        return Terms(q, k, v, F.logsigmoid(widened(decay)) / self.config.slowness)


@core.register("simple-gla", caps=GATED_CAPS, paper="2312.06635", heads=_HEADS)
class SimpleGLA(GatedCore):
    """`GLA` with one decay per head and token, ``a_t = sigmoid(w . x_t)^(1/16)``.

    Differs from the paper: two directions in models that attend both ways.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Gated Linear Attention Transformers with Hardware-Efficient Training, 2023, arXiv
    2312.06635 (section 4, scalar gates).
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(GatedConfig):
        """Knobs of `SimpleGLA`.

        Attributes:
            slowness: the decay is a sigmoid to the power of one over this.
        """

        slowness: Positive = 16.0

        def inputs(self, head_dim: int, value_dim: int) -> Mapping[str, Input]:
            return {"decay": Input()}

    def terms(self, q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor) -> Terms:  # type: ignore[override]
        return Terms(q, k, v, F.logsigmoid(wide(decay)) / self.config.slowness)
