"""Delta rules: a token overwrites what the memory holds under its key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from effformer.nn.precision import widened
from effformer.registry import core
from effformer.site import Site
from effformer.values import NonNegative, Range

from .decays import start_bias, start_rates, step_width
from .gated import GATED_CAPS, GatedConfig, GatedCore, Terms, unit_length, wide
from .outputs import Input

__all__ = ["KDA", "Delta", "GatedDelta"]

_PLAIN = {"qkv_bias": False, "proj_bias": False, "short_conv": 4}
_GATED = _PLAIN | {"gate": {"act": "silu", "norm": "head"}}
_SIGMOID = _PLAIN | {"gate": {"act": "sigmoid", "norm": "head", "rank": "head", "bias": True}}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaConfig(GatedConfig):
    """Knobs of the delta rules.

    Attributes:
        negative: b lies in (0, 2), so that the memory may also be turned round.
        eps: added to the squared lengths of queries and keys.
    """

    negative: bool = False
    eps: NonNegative = 1e-6


class DeltaCore(GatedCore):
    """What the delta rules share: keys and queries of unit length, ``b = sigmoid(w . x)``."""

    DELTA: ClassVar[bool] = True

    def unit(self, x: Tensor) -> Tensor:
        """Queries or keys of unit length."""
        return unit_length(x, self.config.eps)

    def written(self, beta: Tensor) -> Tensor:
        """How much of its key a token overwrites, (B, H, N)."""
        b = wide(beta).sigmoid()
        return 2 * b if self.config.negative else b


@core.register(
    "delta",
    caps=GATED_CAPS,
    paper="2406.06484",
    heads=_PLAIN | {"gate": {"per": "none", "norm": "head"}},
)
class Delta(DeltaCore):
    """DeltaNet: ``S_t = S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T``, ``o_t = K^-1/2 S_t^T q_t``, with
    ``b_t = sigmoid(w . x_t)`` and q, k of unit length.

    The heads around it have short convolutions and a norm of each head's output.

    Differs from the paper: two directions in models that attend both ways.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Parallelizing Linear Transformers with the Delta Rule over Sequence Length, 2024,
    arXiv 2406.06484.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(DeltaConfig):
        """Knobs of `Delta`; see `DeltaConfig`."""

        def inputs(self, head_dim: int, value_dim: int) -> Mapping[str, Input]:
            return {"beta": Input()}

    def terms(self, q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor) -> Terms:  # type: ignore[override]
        return Terms(self.unit(q), self.unit(k), v, None, self.written(beta))


@core.register("gated-delta", caps=GATED_CAPS, paper="2412.06464", heads=_GATED)
class GatedDelta(DeltaCore):
    """Gated DeltaNet: ``S' = a_t S_{t-1}``, ``S_t = S' + b_t k_t (v_t - S'^T k_t)^T``,
    ``o_t = K^-1/2 S_t^T q_t``, with ``a_t = exp(-exp(A) softplus(w . x_t + c))``,
    ``b_t = sigmoid(u . x_t)`` and q, k of unit length.

    The heads around it have short convolutions, a norm of each head's output and a SiLU gate.

    Differs from the paper: two directions in models that attend both ways.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Gated Delta Networks: Improving Mamba2 with Delta Rule, 2024, arXiv 2412.06464.
    """

    PER_HEAD = ("rate", "bias")

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(DeltaConfig):
        """Knobs of `GatedDelta`; see `DeltaConfig`."""

        def inputs(self, head_dim: int, value_dim: int) -> Mapping[str, Input]:
            return {"decay": Input(), "beta": Input()}

    def __init__(self, config: GatedDelta.Config, site: Site) -> None:
        super().__init__(config, site)
        self.rate = nn.Parameter(start_rates(site.heads, low=0.0))
        self.bias = nn.Parameter(start_bias(site.heads))

    def terms(self, q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor, beta: Tensor) -> Terms:  # type: ignore[override]
        time = step_width(wide(decay) + self.bias[:, None])
        fade = -widened(self.rate).exp()[:, None] * time
        return Terms(self.unit(q), self.unit(k), v, fade, self.written(beta))


@core.register("kda", caps=GATED_CAPS, paper="2510.26692", heads=_SIGMOID)
class KDA(DeltaCore):
    """Kimi Delta Attention: `GatedDelta` with a decay for every key channel,
    ``a_t = exp(-exp(A) softplus(W2 W1 x_t + c))``.

    The heads around it have short convolutions, a norm of each head's output and a sigmoid gate.

    Differs from the paper: two directions in models that attend both ways.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: Kimi Linear: An Expressive, Efficient Attention Architecture, 2025, arXiv 2510.26692.
    """

    PER_CHANNEL: ClassVar[bool] = True
    PER_HEAD = ("rate", "bias")

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(DeltaConfig):
        """Knobs of `KDA`, beside `DeltaConfig`.

        Attributes:
            bound: log decays lie in (bound, 0), ``bound sigmoid(exp(A)(W2 W1 x_t + c))``; None for
                the form above.
        """

        bound: Annotated[float, Range(high=0, below=True)] | None = None

        def inputs(self, head_dim: int, value_dim: int) -> Mapping[str, Input]:
            return {"decay": Input(head_dim, rank=value_dim), "beta": Input()}

    def __init__(self, config: KDA.Config, site: Site) -> None:
        super().__init__(config, site)
        width = site.dim // site.heads
        self.rate = nn.Parameter(start_rates(site.heads, low=1.0))
        self.bias = nn.Parameter(start_bias(site.heads * width).view(site.heads, width))

    def terms(self, q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor, beta: Tensor) -> Terms:  # type: ignore[override]
        rate = widened(self.rate).exp()[:, None, None]
        raw = widened(decay) + self.bias[:, None]
        if self.config.bound is None:
            fade = -rate * step_width(raw)
        else:
            fade = self.config.bound * (rate * raw).sigmoid()
        return Terms(self.unit(q), self.unit(k), v, fade, self.written(beta))
