"""A model taken apart for graphs: one that tells the change that its blocks make, one that is given it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .policies import Evaluation, Policy, Reuse
from .predict import Newton, Predictor
from .stack import Branch, Stack

__all__ = ["GivenChange", "ToldChange"]


class _Decided(Policy):
    """Computes, or takes what it is given."""

    def __init__(self, given: Tensor | None) -> None:
        super().__init__(Reuse.Config())
        self._given = given

    def wants(self, now: Evaluation) -> bool:
        return self._given is None

    def predictor(self) -> Predictor:
        held = Newton(0)
        if self._given is not None:
            held.learn(self._given, 0, self._given)
        return held


class _Apart(nn.Module):
    """Args:
    model: with a list of blocks, in evaluation mode.

    Raises:
        CapabilityError: the model has no list of blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._stack = Stack(model, Reuse.Config(), None)
        self.model = self._stack.changed

    def _run(self, x: Tensor, t: Tensor, cond: dict[str, Any], given: Tensor | None) -> Any:
        branch = Branch(_Decided(given))
        out = self._stack.run(branch, Evaluation(0, None, t), x, t, cond)
        return out, branch.value("").predict(0, t)


class ToldChange(_Apart):
    """``forward(x, t, **cond)`` returns the output and the change (B, N, D) that all blocks make."""

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        out, change = self._run(x, t, cond, None)
        return out, change


class GivenChange(_Apart):
    """``forward(x, t, change, **cond)`` returns the output without computing a block."""

    def forward(self, x: Tensor, t: Tensor, change: Tensor, **cond: Any) -> Tensor:
        out: Tensor = self._run(x, t, cond, change)[0]
        return out
