"""Gated linear units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from effformer.context import EMPTY, Context
from effformer.nn.activations import ACTIVATIONS, Activation
from effformer.nn.cut import cut_linear, twin
from effformer.registry import Caps, ffn
from effformer.site import Site
from effformer.values import Positive

from .base import FFN, FFNConfig, switched

__all__ = ["GEGLU", "SwiGLU"]


class _Gated(FFN):
    """``W2 (act(Wg x) * (Wv x))``; ``fc1`` holds the rows of Wg, then those of Wv."""

    def __init__(self, config: FFNConfig, site: Site) -> None:
        super().__init__(config, site)
        self.act = ACTIVATIONS[config.act]
        self.fc1 = nn.Linear(site.dim, 2 * self.hidden, bias=config.bias)
        self.fc2 = nn.Linear(self.hidden, site.dim, bias=config.bias)
        self.drop = nn.Dropout(site.dropout)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        gate, value = self.fc1(x).split([self.hidden, self.hidden], dim=-1)
        hidden = self.act(gate) * value
        if ctx.width is not None:
            hidden = switched(hidden, ctx)
        return self.drop(self.fc2(self.drop(hidden)))

    @property
    def cut(self) -> tuple[nn.Module, ...]:
        """Both layers."""
        return (self.fc1, self.fc2)

    def magnitudes(self) -> Tensor:
        """Norm of each hidden channel's weights, (hidden,)."""
        rows = self.fc1.weight.unflatten(0, (2, -1)).square().sum(dim=(0, 2))
        return (rows + self.fc2.weight.square().sum(dim=0)).sqrt()

    def select(self, units: Tensor) -> Self:
        """The network with some of its hidden channels."""
        small = twin(self)
        small.hidden = units.shape[0]
        small.fc1 = cut_linear(self.fc1, rows=torch.cat([units, units + self.hidden]))
        small.fc2 = cut_linear(self.fc2, columns=units)
        return small

    def macs(self, n: int) -> int:
        return 3 * n * self.site.dim * self.hidden


@ffn.register("swiglu", caps=Caps(packed=True, width=True), paper="2002.05202")
class SwiGLU(_Gated):
    """Gated unit with SiLU: ``W2 (silu(Wg x) * (Wv x))``.

    The default inner width is 8/3 of the token width, which has as many parameters as an `MLP` of
    ratio 4.

    Reference: GLU Variants Improve Transformer, 2020, arXiv 2002.05202.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FFNConfig):
        """Knobs of `SwiGLU`; see `FFNConfig`."""

        ratio: Positive = 8 / 3
        act: Activation = "silu"


@ffn.register("geglu", caps=Caps(packed=True, width=True), paper="2002.05202")
class GEGLU(_Gated):
    """Gated unit with GELU (erf form): ``W2 (gelu(Wg x) * (Wv x))``.

    The default inner width is 8/3 of the token width, which has as many parameters as an `MLP` of
    ratio 4.

    Reference: GLU Variants Improve Transformer, 2020, arXiv 2002.05202.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FFNConfig):
        """Knobs of `GEGLU`; see `FFNConfig`."""

        ratio: Positive = 8 / 3
        act: Activation = "gelu"
