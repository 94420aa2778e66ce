"""Adaptive computation: every token chooses how many learners it runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effformer.context import EMPTY, Context
from effformer.nn.activations import ACTIVATIONS, Activation
from effformer.nn.learners import Gate, Learners
from effformer.registry import Caps, ffn
from effformer.site import Site
from effformer.values import Count, Natural

from .base import FFN, FFNConfig

__all__ = ["ACM"]


@ffn.register("acm", caps=Caps(packed=True, dynamic=True), paper="2312.10193")
class ACM(FFN):
    """Adaptive computation module: a gate chooses for every token how many of K learners it runs.

    See `effformer.nn.learners.Learners` for the equations. The inner width of the FFN is that of
    all learners together. A token that runs none passes by on the residual branch.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        ValueError: the inner width is not divisible by the learners.

    Reference: Adaptive Computation Modules: Granular Conditional Computation For Efficient
    Inference, 2023, arXiv 2312.10193.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FFNConfig):
        """Knobs of `ACM`.

        Attributes:
            bias: the inner layers have biases.
            out_bias: the outputs have biases.
            learners: K.
            least: fewest learners that a token may run.
            fixed: every token runs so many learners, for a graph of constant cost; None: the gate
                decides.
            gate: knobs of the gate.
        """

        act: Activation = "gelu"
        out_bias: bool = False
        learners: Count = 4
        least: Natural = 0
        fixed: Natural | None = None
        gate: Gate.Config = Gate.Config()

        def check(self) -> None:
            if self.least >= self.learners:
                raise ValueError(
                    f"acm: needs least < learners, got least={self.least}, learners={self.learners}"
                )
            if self.fixed is not None and not self.least <= self.fixed <= self.learners:
                raise ValueError(
                    f"acm: fixed must lie in [{self.least}, {self.learners}], got {self.fixed}"
                )

    def __init__(self, config: ACM.Config, site: Site) -> None:
        super().__init__(config, site)
        if self.hidden % config.learners:
            raise ValueError(
                f"{site.path or 'acm'}: inner width {self.hidden} is not divisible by "
                f"{config.learners} learners; change hidden (or ratio) or learners"
            )
        self.learners = Learners(
            site.dim,
            count=config.learners,
            width=self.hidden // config.learners,
            act=ACTIVATIONS[config.act],
            bias=config.bias,
            out_bias=config.out_bias,
            gate=config.gate,
            least=config.least,
            fixed=config.fixed,
            dropout=site.dropout,
        )

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        self.check_width(ctx)
        run = self.learners(x, complete=ctx.complete)
        if ctx.ledger is not None:
            path = self.site.path
            done = self.learners.account(run, ctx.ledger, path)
            ctx.ledger.work(path, done / self.macs(x.shape[1]))
        return run.out

    def macs(self, n: int) -> int:
        return self.learners.macs(n)
