"""Discrete choices inside a network: noise, straight-through gradients, and whether values are
known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from effformer.context import EMPTY, Context

from .precision import exactly, widened

__all__ = ["GateLinear", "Switch", "gumbel_like", "straight_through", "values_known"]


def values_known(x: Tensor) -> bool:
    """True if the program may depend on the values of ``x``.

    While a graph is captured (`torch.export`, `torch.compile`) or shapes alone are followed (fake
    and meta tensors), parts that skip work run their static form instead, in ONNX graphs the one that gathers
    (`effformer.nn.onnx_nodes.gathers`).
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return not (isinstance(x, FakeTensor) or x.is_meta)


def gumbel_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise ``-log(-log(u))`` of the shape of ``x``, in float32 at least: smaller
    types draw zeros, whose logarithm is infinite.

    Args:
        x: shape and device.
        generator: source of randomness; None means torch's default generator, as `nn.Dropout` does.
    """
    exponential = torch.empty_like(widened(x), memory_format=torch.contiguous_format)
    return -exponential.exponential_(generator=generator).log()


def straight_through(soft: Tensor) -> Tensor:
    """One-hot of the largest entry of the last dimension, with the gradient of ``soft``.

    Ties go to the first. The sum ``hard + soft - soft`` is arranged so that the values are exactly
    0 and 1.
    """
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())


class GateLinear(nn.Linear):
    """The linear layer of a gate: Xavier-uniform weights, a constant bias, at least float32.

    A model's own initialisation leaves it alone. Gates near zero flip with the last bits, so the
    product is evaluated in float32 also in models of lower precision and under autocast.

    Args:
        inputs: width of the input.
        outputs: number of logits.
        start: initial bias.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"": "gates"}

    def __init__(self, inputs: int, outputs: int, *, start: float = 0.0) -> None:
        self.start = start
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        """Xavier-uniform weights; the bias is ``start``."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.constant_(self.bias, self.start)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        wide = widened(x)
        with exactly(x):
            return F.linear(wide, self.weight.to(wide.dtype), self.bias.to(wide.dtype))


class Switch(nn.Module):
    """Turns logits into 0 or 1.

    Training samples: 1 where ``sigmoid((a + g1 - g2) / tau) > threshold``, g1 and g2 standard
    Gumbel noise, with the gradient of the sigmoid; with the threshold 1/2, P(1) = sigmoid(a)
    whatever tau. Evaluation takes 1 where ``sigmoid(a) > threshold``.

    A `Tap` may read and replace the noise g1 - g2 at ``<path>.noise`` and the values at ``<path>``.

    Args:
        tau: temperature; scales the gradient.
        threshold: in (0, 1).
        path: name of the places.
        generator: source of noise; None means torch's default generator, as `nn.Dropout` does.

    Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456; Categorical Reparameterization
    with Gumbel-Softmax, 2016, arXiv 1611.01144.
    """

    def __init__(
        self,
        *,
        tau: float = 5.0,
        threshold: float = 0.5,
        path: str = "",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.tau, self.threshold, self.path = tau, threshold, path
        self.generator = generator

    def forward(self, logits: Tensor, ctx: Context = EMPTY) -> Tensor:
        """Zeros and ones of the shape and type of the logits."""
        if self.training:
            noise = gumbel_like(logits, self.generator) - gumbel_like(logits, self.generator)
            if ctx.tap is not None:
                noise = ctx.tap(f"{self.path}.noise", noise)
            soft = torch.sigmoid((logits + noise) / self.tau)
            values = (soft > self.threshold).to(soft.dtype) + (soft - soft.detach())
        else:
            values = (torch.sigmoid(logits) > self.threshold).to(logits.dtype)
        return values if ctx.tap is None else ctx.tap(self.path, values)
