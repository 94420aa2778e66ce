"""Discrete choices inside a network: noise, straight-through gradients, and whether values are
known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["gumbel_like", "straight_through", "values_known"]


def values_known(x: Tensor) -> bool:
    """True if the program may depend on the values of ``x``.

    While a graph is captured (`torch.export`, `torch.compile`) or shapes alone are followed (fake
    and meta tensors), parts that skip work run their static form instead.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return not (isinstance(x, FakeTensor) or x.is_meta)


def gumbel_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise ``-log(-log(u))`` of the shape of ``x``.

    Args:
        x: shape, dtype and device.
        generator: source of randomness; None means torch's default generator, as `nn.Dropout` does.
    """
    exponential = torch.empty_like(x, memory_format=torch.contiguous_format)
    return -exponential.exponential_(generator=generator).log()


def straight_through(soft: Tensor) -> Tensor:
    """One-hot of the largest entry of the last dimension, with the gradient of ``soft``.

    Ties go to the first. The sum ``hard + soft - soft`` is arranged so that the values are exactly
    0 and 1.
    """
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())
