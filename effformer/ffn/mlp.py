"""Two linear layers with an activation between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from effformer.context import EMPTY, Context
from effformer.nn.activations import ACTIVATIONS
from effformer.nn.cut import cut_linear, twin
from effformer.registry import Caps, ffn
from effformer.site import Site

from .base import FFN, FFNConfig, switched

__all__ = ["MLP"]


@ffn.register("mlp", caps=Caps(packed=True, width=True), paper="1706.03762")
class MLP(FFN):
    """Two linear layers: ``W2 act(W1 x + b1) + b2``.

    Reference: Attention Is All You Need, 2017, arXiv 1706.03762.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FFNConfig):
        """Knobs of `MLP`; see `FFNConfig`."""

    def __init__(self, config: FFNConfig, site: Site) -> None:
        super().__init__(config, site)
        self.act = ACTIVATIONS[config.act]
        self.fc1 = nn.Linear(site.dim, self.hidden, bias=config.bias)
        self.fc2 = nn.Linear(self.hidden, site.dim, bias=config.bias)
        self.drop = nn.Dropout(site.dropout)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        hidden = self.fc1(x)
        if ctx.width is not None:
            hidden = switched(hidden, ctx)
        return self.drop(self.fc2(self.drop(self.act(hidden))))

    @property
    def cut(self) -> tuple[nn.Module, ...]:
        """Both layers."""
        return (self.fc1, self.fc2)

    def magnitudes(self) -> Tensor:
        """Norm of each hidden channel's weights, (hidden,)."""
        rows, columns = self.fc1.weight.square().sum(dim=1), self.fc2.weight.square().sum(dim=0)
        return (rows + columns).sqrt()

    def select(self, units: Tensor) -> MLP:
        """The network with some of its hidden channels."""
        small = twin(self)
        small.hidden = units.shape[0]
        small.fc1 = cut_linear(self.fc1, rows=units)
        small.fc2 = cut_linear(self.fc2, columns=units)
        return small

    def macs(self, n: int) -> int:
        return 2 * n * self.site.dim * self.hidden
