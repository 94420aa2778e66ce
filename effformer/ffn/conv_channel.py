"""Channel mixer of LMUFormer: two 1x1 convolutions with a batch norm between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from effformer.context import EMPTY, Context, explained
from effformer.nn.activations import ACTIVATIONS, Activation
from effformer.nn.lif import LIF
from effformer.nn.norms import TokenBatchNorm
from effformer.registry import Caps, ffn
from effformer.site import Site

from .base import FFN, FFNConfig, InnerConfig, refuse_fields

__all__ = ["ConvChannel", "SpikingConvChannel"]


@ffn.register("conv-channel", caps=Caps(packed=True), paper="2402.04882")
class ConvChannel(FFN):
    """Two 1x1 convolutions around a batch norm: ``W2 act(BN(W1 x + b1)) + b2``.

    A 1x1 convolution is a linear layer on every token. In the published network BN and ReLU follow;
    they belong to the block `lmu`.

    Args:
        config: the knobs.
        site: the place in the model.

    Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units,
    2024, arXiv 2402.04882.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FFNConfig):
        """Knobs of `ConvChannel`; see `FFNConfig`."""

        act: Activation = "gelu"

    def __init__(self, config: ConvChannel.Config, site: Site) -> None:
        super().__init__(config, site)
        self.fc1 = nn.Linear(site.dim, self.hidden, bias=config.bias)
        self.norm = TokenBatchNorm(self.hidden)
        self.act = ACTIVATIONS[config.act]
        self.fc2 = nn.Linear(self.hidden, site.dim, bias=config.bias)
        self.drop = nn.Dropout(site.dropout)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        self.check_width(ctx)
        return self.drop(self.fc2(self.drop(self.act(self.norm(self.fc1(x))))))

    def macs(self, n: int) -> int:
        return 2 * n * self.site.dim * self.hidden


@ffn.register(
    "spiking-conv-channel", caps=Caps(causal="always", streaming=True), paper="2402.04882"
)
class SpikingConvChannel(FFN):
    """Spiking channel mixer: ``W2 LIF(BN(W1 x + b1)) + b2``, its neurons charging along the tokens.

    Each neuron carries a potential from token to token, so the part is causal and streams.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        CapabilityError: at call, a mask or packed rows: neurons charge on padding and keep their
            potential across sequences.

    Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units,
    2024, arXiv 2402.04882.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(InnerConfig):
        """Knobs of `SpikingConvChannel`, beside `InnerConfig`.

        Attributes:
            lif: the neurons.
        """

        lif: LIF.Config = field(default_factory=LIF.Config)

    def __init__(self, config: SpikingConvChannel.Config, site: Site) -> None:
        super().__init__(config, site)
        self.fc1 = nn.Linear(site.dim, self.hidden, bias=config.bias)
        self.norm = TokenBatchNorm(self.hidden)
        self.lif = LIF(config.lif)
        self.fc2 = nn.Linear(self.hidden, site.dim, bias=config.bias)
        self.drop = nn.Dropout(site.dropout)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        out, _ = self.step(x, self.init_state(x.shape[0], like=x), ctx)
        return self.drop(out)

    @explained
    def init_state(self, batch: int, *, like: Tensor) -> Tensor:
        """Potentials (B, hidden) before the first token."""
        return self.lif.init_state(batch, self.hidden, like=like)

    @explained
    def step(self, x: Tensor, state: Tensor, ctx: Context = EMPTY) -> tuple[Tensor, Tensor]:
        """Feed the next tokens x (B, n, D)."""
        self.check_width(ctx)
        where = self.site.path or "spiking-conv-channel"
        what = "'spiking-conv-channel' carries potentials from token to token"
        refuse_fields(ctx, ("mask", "packing"), what, where)
        spikes, state = self.lif(self.norm(self.fc1(x)), state)
        return self.fc2(spikes), state

    def macs(self, n: int) -> int:
        """Dense work: products with spikes count like any other."""
        return 2 * n * self.site.dim * self.hidden
