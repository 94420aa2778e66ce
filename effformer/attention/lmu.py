"""Legendre memory unit: a token mixer without attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from effformer.checks import CapabilityError, check_batch, check_state
from effformer.config import Config as BaseConfig
from effformer.context import EMPTY, Context, check_context, explained
from effformer.nn.legendre import LegendreMemory
from effformer.registry import Caps, attention
from effformer.site import Site
from effformer.values import Count, Range

from .base import Mixer, check_streamed
from .slices import over_sequences

__all__ = ["LMU", "LMUState"]

_CAPS = Caps(causal="always", mask="key", packed=True, streaming=True, cost="n")


class LMUState(NamedTuple):
    """What an `LMU` keeps of the tokens that it has read.

    Attributes:
        memory: (B, q) coefficients.
    """

    memory: Tensor


@attention.register("lmu", caps=_CAPS, paper="2402.04882")
class LMU(Mixer):
    """Legendre memory unit: one scalar per token is remembered, and every token reads the memory.

    ::

        u_t = relu(w . x_t + b)                   what a token writes, one number
        m_t = Ad m_(t-1) + bd u_t                 the last theta numbers as q coefficients
        h_t = relu(W [m_t ; x_t] + c)             what it reads
        y_t = proj(h_t)

    The recurrence is linear and its matrices are constants, so the memory of all tokens is a causal
    convolution (`effformer.nn.legendre`): it trains in parallel over any number of tokens, and reads
    token by token with a state of q numbers. Work grows linearly in tokens once there are more than
    about 2 theta of them.

    A masked token writes nothing; time passes over it. So left padding changes nothing, and right
    padding could not, because no token sees later ones.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        ValueError: without ``proj`` the width is ``site.out_dim`` or ``site.dim``, and ``hidden``
            differs from it.

    Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units,
    2024, arXiv 2402.04882.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `LMU`.

        Attributes:
            memory: q, number of coefficients; None for the width of the tokens.
            theta: window in tokens that the memory represents.
            hidden: width of h; None for the width of the output.
            proj: a linear map follows; False returns h.
        """

        memory: Count | None = None
        theta: Annotated[float, Range(1)] = 128.0
        hidden: Count | None = None
        proj: bool = True

    def __init__(self, config: LMU.Config, site: Site) -> None:
        super().__init__(config, site)
        self.where = site.path or "lmu"
        order, hidden, out = lmu_widths(config, site)
        self.write = nn.Linear(site.dim, 1)
        self.memory = LegendreMemory(order, config.theta)
        self.read = nn.Linear(order + site.dim, hidden)
        self.proj = nn.Linear(hidden, out) if config.proj else nn.Identity()
        self.drop = nn.Dropout(site.dropout)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        check_context(ctx, _CAPS, "attention", self.where, x)
        if ctx.packing is None:
            return self.drop(self.proj(self._mix(x, ctx.mask)))
        if ctx.mask is not None:
            raise CapabilityError(f"{self.where}: packing goes with no mask; unpack first")
        mixed = over_sequences(lambda one, _: self._mix(one, None), x, ctx)
        return self.drop(self.proj(mixed))

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        return self.memory.macs(n) + n * lmu_maps(self.config, self.site)

    @explained
    def init_state(self, batch: int, *, like: Tensor) -> LMUState:
        """The empty memory, in float32 at least."""
        check_batch(batch, where=f"{self.where}: init_state")
        return LMUState(self.memory.init_state(batch))

    @explained
    def step(self, x: Tensor, state: LMUState, ctx: Context = EMPTY) -> tuple[Tensor, LMUState]:
        """Feed the next tokens x (B, n, D).

        Raises:
            CapabilityError: the context carries what cannot be honoured.
        """
        check_streamed(ctx, self.where)
        check_state(state, LMUState, x.shape[0], where=f"{self.where}: step")
        check_context(ctx, _CAPS, "attention", self.where, x)
        m, memory = self.memory.step(self._write(x, None), state.memory)
        return self.proj(self._read(m, x)), LMUState(memory)

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self._read(self.memory(self._write(x, mask)), x)

    def _write(self, x: Tensor, mask: Tensor | None) -> Tensor:
        u = self.write(x).squeeze(-1).relu()
        return u if mask is None else u * mask

    def _read(self, m: Tensor, x: Tensor) -> Tensor:
        return self.read(torch.cat([m, x], dim=-1)).relu()


def lmu_widths(config: LMU.Config, site: Site) -> tuple[int, int, int]:
    """Coefficients, width of h and width of the output.

    Raises:
        ValueError: without a projection h is the output, but ``hidden`` differs from its width.
    """
    out = site.out_dim or site.dim
    hidden = config.hidden or out
    if not config.proj and hidden != out:
        raise ValueError(
            f"{site.path or 'lmu'}: without proj the output is hidden={hidden} wide, but {out} is "
            "needed; leave hidden at None or use proj=True"
        )
    return config.memory or site.dim, hidden, out


def lmu_maps(config: LMU.Config, site: Site) -> int:
    """Multiply-adds of a unit's linear maps on one token: writing, reading, projecting."""
    order, hidden, out = lmu_widths(config, site)
    return site.dim + (order + site.dim) * hidden + (hidden * out if config.proj else 0)
