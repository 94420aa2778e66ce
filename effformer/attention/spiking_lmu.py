"""Spiking Legendre memory unit: the signals between its parts are spikes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effformer.checks import check_batch, check_state
from effformer.context import EMPTY, Context, check_context, explained
from effformer.nn.legendre import LegendreMemory
from effformer.nn.lif import LIF
from effformer.nn.norms import TokenBatchNorm
from effformer.registry import Caps, attention
from effformer.site import Site

from .base import Mixer, check_streamed
from .lmu import LMU, lmu_maps, lmu_widths
from .slices import over_sequences

__all__ = ["SpikingLMU", "SpikingLMUState"]

_CAPS = Caps(causal="always", packed=True, streaming=True, cost="n")


class SpikingLMUState(NamedTuple):
    """What a `SpikingLMU` keeps of the tokens that it has read.

    Attributes:
        memory: (B, q) coefficients.
        write: (B, 1) potential of the neuron that writes.
        recall: (B, q) potentials of the neurons that see the memory.
        read: (B, hidden) potentials of the neurons that read.
    """

    memory: Tensor
    write: Tensor
    recall: Tensor
    read: Tensor


@attention.register("spiking-lmu", caps=_CAPS, paper="2402.04882")
class SpikingLMU(Mixer):
    """Spiking Legendre memory unit: an `LMU` with leaky integrate-and-fire neurons for ReLUs.

    ::

        u_t = LIF(BN(w . x_t + b))                spikes are written
        m_t = Ad m_(t-1) + bd u_t                 the memory itself holds real numbers
        s_t = LIF(BN(m_t))                        and is seen through spikes
        h_t = LIF(BN(W [s_t ; x_t] + c))
        y_t = proj(h_t)

    The time of the neurons is the sequence of tokens. `step` carries every potential and gives the
    spikes of the parallel form. Key masks are refused, because neurons charge on padding; padding on
    the right needs none, because no token sees later ones.

    Args:
        config: the knobs.
        site: the place in the model.

    Differs from the paper: its token-by-token form leaves out BN and LIF of the memory, which
    changes the output; ours is the parallel form.

    Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units,
    2024, arXiv 2402.04882.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(LMU.Config):
        """Knobs of `SpikingLMU`, beside those of `LMU`.

        Attributes:
            normed: batch norms stand before the neurons.
            recall: neurons stand between memory and reading; without, ``s = m``.
            lif: the neurons.
        """

        normed: bool = True
        recall: bool = True
        lif: LIF.Config = field(default_factory=LIF.Config)

    def __init__(self, config: SpikingLMU.Config, site: Site) -> None:
        super().__init__(config, site)
        self.where = site.path or "spiking-lmu"
        order, hidden, out = lmu_widths(config, site)
        self.write = nn.Linear(site.dim, 1)
        self.write_norm = _norm(1, config.normed)
        self.memory = LegendreMemory(order, config.theta)
        if config.recall:
            self.recall_norm = _norm(order, config.normed)
        self.read = nn.Linear(order + site.dim, hidden)
        self.read_norm = _norm(hidden, config.normed)
        self.write_lif, self.recall_lif, self.read_lif = (LIF(config.lif) for _ in range(3))
        self.proj = nn.Linear(hidden, out) if config.proj else nn.Identity()
        self.drop = nn.Dropout(site.dropout)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        check_context(ctx, _CAPS, "attention", self.where, x)
        if ctx.packing is None:
            h, _ = self._run(x, None)
        else:
            h = over_sequences(lambda one, _: self._run(one, None)[0], x, ctx)
        return self.drop(self.proj(h))

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        """Dense work: products with spikes count like any other."""
        return self.memory.macs(n) + n * lmu_maps(self.config, self.site)

    @explained
    def init_state(self, batch: int, *, like: Tensor) -> SpikingLMUState:
        """The empty memory, and neurons at rest."""
        check_batch(batch, where=f"{self.where}: init_state")
        order, hidden = self.memory.order, self.read.out_features
        write, recall, read = (
            self.read_lif.init_state(batch, width, like=like) for width in (1, order, hidden)
        )
        return SpikingLMUState(self.memory.init_state(batch), write, recall, read)

    @explained
    def step(
        self, x: Tensor, state: SpikingLMUState, ctx: Context = EMPTY
    ) -> tuple[Tensor, SpikingLMUState]:
        """Feed the next tokens x (B, n, D).

        Raises:
            CapabilityError: the context carries what cannot be honoured.
        """
        check_streamed(ctx, self.where)
        check_state(state, SpikingLMUState, x.shape[0], where=f"{self.where}: step")
        check_context(ctx, _CAPS, "attention", self.where, x)
        h, after = self._run(x, state)
        return self.proj(h), after

    def _run(self, x: Tensor, state: SpikingLMUState | None) -> tuple[Tensor, SpikingLMUState]:
        """Spikes h of the next tokens, in parallel if there is no state."""
        known = state or self.init_state(x.shape[0], like=x)
        u, write = self.write_lif(self.write_norm(self.write(x)), known.write)
        if state is None:
            m, memory = self.memory(u.squeeze(-1)), known.memory
        else:
            m, memory = self.memory.step(u.squeeze(-1), state.memory)
        recall = known.recall
        if self.config.recall:
            m, recall = self.recall_lif(self.recall_norm(m), recall)
        h = self.read_norm(self.read(torch.cat([m, x], dim=-1)))
        h, read = self.read_lif(h, known.read)
        return h, SpikingLMUState(memory, write, recall, read)


def _norm(width: int, normed: bool) -> nn.Module:
    return TokenBatchNorm(width) if normed else nn.Identity()
