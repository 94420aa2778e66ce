"""Projections of an attention whose tokens choose how much of them they run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from effformer.config import Config
from effformer.context import Ledger
from effformer.nn.activations import ACTIVATIONS, Activation
from effformer.nn.learners import Gate, Learners, Run
from effformer.values import Count, Natural, Positive

__all__ = ["AdaptiveProjections", "Work", "project"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveProjections(Config):
    """Query, key, value and output projections as sums of low-rank learners, a gate for each.

    See `effformer.nn.learners.Learners`; by default there is no activation, so a token that runs k
    of K learners is projected by a matrix of rank ``k h``.

    Attributes:
        learners: K.
        width: inner width h of one learner; None means ``round(c (D E + E) / (D + E + 1))`` for a
            projection D -> E with ``c = size / K``: all learners together have ``size`` times the
            parameters of the matrix that they replace.
        size: see ``width``.
        act: activation of the learners.
        bias: the inner layers have biases.
        out_bias: the outputs have biases.
        least: fewest learners that a token may run; none would leave it without a query or key.
        fixed: every token runs so many learners; None: the gate decides.
        gate: knobs of the gates.

    Reference: Adaptive Computation Modules: Granular Conditional Computation For Efficient
    Inference, 2023, arXiv 2312.10193.
    """

    learners: Count = 4
    width: Count | None = None
    size: Positive = 1.0
    act: Activation = "identity"
    bias: bool = True
    out_bias: bool = False
    least: Natural = 1
    fixed: Natural | None = None
    gate: Gate.Config = Gate.Config()

    def check(self) -> None:
        if self.least >= self.learners:
            raise ValueError(
                f"projections: needs least < learners, got least={self.least}, "
                f"learners={self.learners}"
            )
        if self.fixed is not None and not self.least <= self.fixed <= self.learners:
            raise ValueError(
                f"projections: fixed must lie in [{self.least}, {self.learners}], got {self.fixed}"
            )

    def build(self, dim: int, out_dim: int, dropout: float = 0.0) -> Learners:
        """The learners of one projection."""
        even = self.size / self.learners * (dim * out_dim + out_dim) / (dim + out_dim + 1)
        return Learners(
            dim,
            out_dim=out_dim,
            count=self.learners,
            width=self.width or max(1, round(even)),
            act=ACTIVATIONS[self.act],
            bias=self.bias,
            out_bias=self.out_bias,
            gate=self.gate,
            least=self.least,
            fixed=self.fixed,
            dropout=dropout,
        )


@dataclass(slots=True)
class Work:
    """Adds up what the projections of one forward executed.

    Attributes:
        ledger: takes the choices of the gates; None: nothing is recorded.
        path: of the attention; its projections stand below it in the ledger.
        complete: every token runs all learners.
        executed: (B,) multiply-adds of each sample in each projection with learners.
    """

    ledger: Ledger | None
    path: str
    complete: bool = False
    executed: list[Tensor] = field(default_factory=list)


def project(module: nn.Module, x: Tensor, name: str, work: Work) -> Tensor:
    """A projection (B, N, D) -> (B, N, E), a plain matrix or learners.

    Args:
        module: the projection.
        x: tokens.
        name: of the projection in the attention.
        work: where learners report.
    """
    if not isinstance(module, Learners):
        y: Tensor = module(x)
        return y
    run: Run = module(x, complete=work.complete)
    if work.ledger is not None:
        place = f"{work.path}.{name}" if work.path else name
        work.executed.append(module.account(run, work.ledger, place))
    return run.out
