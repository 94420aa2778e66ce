"""What one evaluation of a graph costs, as a bundle records it."""

from __future__ import annotations

from torch import Tensor, nn

from effformer.profile import profile

__all__ = ["multiply_adds"]


def multiply_adds(network: nn.Module, inputs: dict[str, Tensor] | Tensor) -> int:
    """Multiply-adds of one sample; of dynamic parts those that this example executes."""
    if isinstance(inputs, dict):
        cost = profile(network, {n: value[:1] for n, value in inputs.items()}, memory=False)
    else:
        cost = profile(network, inputs[:1], memory=False)
    return cost.total if cost.executed is None else cost.executed
