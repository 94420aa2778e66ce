"""Where dynamic parts report what the output tensor cannot carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Choice", "Ledger", "Share"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What the gate of a dynamic part chose.

    Attributes:
        gate: (B, N, K + 1) probabilities, or one-hot with a gradient, of running 0..K units.
        cost: multiply-adds of one unit on one token.
    """

    gate: Tensor
    cost: float


@dataclass(frozen=True, slots=True)
class Share:
    """How much of its dense work a dynamic part executed.

    Attributes:
        fraction: (B,) in [0, 1], with the gradient of the gates.
        cost: dense multiply-adds of one sample.
    """

    fraction: Tensor
    cost: float


@dataclass(slots=True)
class Ledger:
    """Where dynamic parts write what the output tensor cannot carry.

    Attributes:
        losses: auxiliary losses by name; the trainer adds `total_loss` to its objective.
        executed: fraction of its dense work that each part executed, (B,) tensors in [0, 1]; the
            profiler reports executed = dense x fraction.
        choices: what gates chose, for losses over all of them.
        shares: executed fractions with their gradients, for losses on the work of all parts.
        step: the optimizer step, counted from 0, for losses that follow a schedule; the trainer
            sets it.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    executed: dict[str, Tensor] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)
    step: int = 0

    def loss(self, name: str, value: Tensor) -> None:
        """Record an auxiliary loss; the same name adds up."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def work(self, name: str, fraction: Tensor, cost: float | None = None) -> None:
        """Record the executed fraction (B,) of the part at path ``name``; with its dense cost also
        as a `Share`.
        """
        self.executed[name] = fraction.detach()
        if cost is not None:
            self.shares[name] = Share(fraction, cost)

    def choose(self, name: str, gate: Tensor, cost: float) -> None:
        """Record the gate of the part at path ``name``, see `Choice`."""
        self.choices[name] = Choice(gate, cost)

    def average(self, passes: Sequence[Ledger]) -> None:
        """Record what a part did that ran several times, each with a ledger of its own.

        Losses and executed fractions are means over the passes, dense costs add up; choices stand
        one behind the other as if the tokens were so many more.
        """
        for name in passes[0].losses:
            self.loss(name, torch.stack([p.losses[name] for p in passes]).mean(dim=0))
        for name in passes[0].executed:
            self.work(name, torch.stack([p.executed[name] for p in passes]).mean(dim=0))
        for name in passes[0].shares:
            made = [p.shares[name] for p in passes]
            fraction = torch.stack([s.fraction for s in made]).mean(dim=0)
            self.shares[name] = Share(fraction, sum(s.cost for s in made))
        for name in passes[0].choices:
            chosen = [p.choices[name] for p in passes]
            self.choose(name, torch.cat([c.gate for c in chosen], dim=1), chosen[0].cost)

    def total_loss(self) -> Tensor | float:
        """Sum of the auxiliary losses, 0.0 if there are none."""
        return sum(self.losses.values(), start=0.0)
