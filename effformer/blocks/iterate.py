"""Depth without weights: one block, run several times."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import EMPTY, Context, Ledger
from effformer.registry import Caps, block
from effformer.site import Site
from effformer.values import Count

from .base import Block, Branch, below
from .prenorm import PreNorm

__all__ = ["Iterate"]


@block.register(
    "iterate",
    caps=Caps(cond="optional", sequential=True, cross=True, packed=True, mixer_only=True),
    paper="2412.18840",
)
class Iterate(Block):
    """One block as L implicit steps: L times ``x + (block(x) - x) / L`` with the same weights.

    ``block(x) - x`` is what the branches of a residual block add, so the steps follow the flow
    ``dx/ds = block(x) - x`` for one unit of s; one step is the block itself. Parameters do not
    depend on L, work grows with it. Auxiliary losses and executed fractions in ``ctx.ledger`` are
    means over the steps.

    In a model that has a block already, ``block={"name": "iterate", "times": 4}`` repeats that one.

    Differs from the paper: there the block is one factorized attention; here it is any block.

    Args:
        config: the knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the position-wise network, None for none.
        cross: config of the mixer that attends to a memory of width ``site.memory_dim``, None for
            no such branch.

    Raises:
        CapabilityError: at call, tokens are fed piece by piece: the state of a mixer belongs to one
            step.

    Reference: Implicit factorized transformer approach to fast prediction of turbulent channel
    flows, 2024, arXiv 2412.18840.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `Iterate`.

        Attributes:
            times: number L of steps.
            body: the block; where none is named, the one that it takes the place of.
        """

        times: Count = 4
        body: BaseConfig = part("block", PreNorm.Config())

        def caps(self) -> Caps:
            """What the body can do."""
            return self.body.caps()

    def __init__(
        self,
        config: Iterate.Config,
        site: Site,
        *,
        attn: BaseConfig,
        ffn: BaseConfig | None,
        cross: BaseConfig | None = None,
    ) -> None:
        super().__init__({}, replace(site, cond_dim=None))  # branches and modulation are the body's
        self.site = site
        self.config, self.times = config, config.times
        more = {} if cross is None else {"cross": cross}
        here = below(site, "body")
        self.body: Block = config.body.build(here, attn=attn, ffn=ffn, **more)
        self.order = self.body.order

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches of the body, which every step runs."""
        return self.body.branches

    def attach(self, *, width: BaseConfig | None = None, tokens: BaseConfig | None = None) -> None:
        """Fill the slots of the body; None leaves a slot as it is."""
        self.body.attach(width=width, tokens=tokens)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        if self.times == 1:
            return self.body(x, ctx)
        if ctx.stream is not None:
            raise CapabilityError(
                f"{self.site.path or 'iterate'}: 'iterate' cannot stream {self.times} steps that "
                f"share one mixer; use times=1, or block={self.config.body.entry.name!r} at a larger depth"
            )
        if ctx.ledger is None:
            for _ in range(self.times):
                x = self._step(x, ctx)
            return x
        ledgers = [Ledger() for _ in range(self.times)]
        for ledger in ledgers:
            x = self._step(x, replace(ctx, ledger=ledger))
        ctx.ledger.average(ledgers)
        return x

    def _step(self, x: Tensor, ctx: Context) -> Tensor:
        # a step ends between the two ends of the body: no token may be missing there
        return torch.lerp(x, self.body(x, replace(ctx, merging=None)), 1 / self.times)

    def macs(
        self, n: int, m: int | tuple[int, ...] | None = None, *, grid: tuple[int, ...] | None = None
    ) -> int:
        return self.times * self.body.macs(n, m, grid=grid)
