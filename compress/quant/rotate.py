"""Rotation: groups of input channels are turned by a Hadamard matrix, around any other scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer import registry
from effformer.config import Config, part

from .calibrate import Seen
from .schemes import Kernel, Layout, Scheme, Tensors
from .symmetric import W4A4

__all__ = ["Rotate", "regular_hadamard", "turn"]

_MIXABLE = {"second", "sample"}


def regular_hadamard(
    size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """The regular Hadamard matrix of a power of 4, divided by its root: orthogonal, symmetric, and the
    sums of all rows are equal, so that no channel collects the mean of the others.

    The Kronecker power of the 4 x 4 matrix of ones with -1 on its other diagonal.
    """
    base = (1.0 - 2.0 * torch.eye(4, dtype=dtype, device=device).flip(0)) / 2.0
    out = torch.ones(1, 1, dtype=dtype, device=device)
    while len(out) < size:
        out = torch.kron(out, base)
    return out


def turn(x: Tensor, group: int) -> Tensor:
    """Turn groups of the last axis (..., K), filled with zeros to whole groups; its own inverse."""
    matrix = regular_hadamard(group, dtype=x.dtype, device=x.device)
    k = x.shape[-1]
    rows = F.pad(x, (0, -k % group)) if k % group else x
    return (rows.unflatten(-1, (-1, group)) @ matrix).flatten(-2)


@registry.quantizer.register("rotate", paper="2512.03673")
class Rotate(Scheme):
    """Outliers of inputs are spread over their group before both sides are rounded: ``(x R) (W R)^T``
    with R orthogonal, block-diagonal.

    Around 4-bit weights and inputs unless ``scheme`` says otherwise. Inputs are turned in every call, a
    product with a small matrix.

    Reference: ConvRot: Rotation-Based Plug-and-Play 4-bit Quantization for Diffusion Transformers, 2025,
        arXiv 2512.03673.
    """

    name, by_row, prepares = "rotate", False, True
    config: Rotate.Config

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Config):
        """Knobs of `Rotate`.

        Attributes:
            scheme: how the turned weight is stored.
            group: channels that are mixed.
        """

        scheme: Config = part("quantizer", W4A4.Config())
        group: Literal[4, 16, 64, 256] = 64

        def check(self) -> None:
            wants = self.scheme.build().wants
            if mixed := [want for want in wants if want not in _MIXABLE]:
                raise ValueError(
                    f"scheme {self.scheme.entry.name!r} reads the {mixed[0]} of single channels, which "
                    "rotation mixes; put rotate inside of it instead"
                )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner: Scheme = config.scheme.build()
        self.bits, self.step, self.wants = self.inner.bits, self.inner.step, self.inner.wants

    def layout(self, n: int, k: int) -> Layout:
        return self.inner.layout(n, self._filled(k))

    def _filled(self, k: int) -> int:
        return k + -k % self.config.group

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return self.fit(weight, None)

    def fit(self, weight: Tensor, seen: Seen | None) -> dict[str, Tensor]:
        turned = None if seen is None else seen.mapped(lambda x: turn(x, self.config.group))
        return self.inner.fit(turn(weight.float(), self.config.group), turned)

    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        inner = self.inner.decode(tensors, n, self._filled(k))
        return turn(inner, self.config.group)[:, :k]

    def base(self, tensors: Tensors, n: int, k: int) -> Tensor:
        return self.inner.base(tensors, n, self._filled(k))

    def prepare(self, x: Tensor, tensors: Tensors) -> Tensor:
        return self.inner.prepare(turn(x, self.config.group), tensors)

    def linear(self, x: Tensor, tensors: Tensors, n: int, k: int) -> Tensor:
        return self.inner.linear(turn(x, self.config.group), tensors, n, self._filled(k))

    def macs(self, n: int, k: int) -> int:
        filled = self._filled(k)
        return self.inner.macs(n, filled) + filled * self.config.group

    def of_table(self) -> Scheme:
        return self.inner.of_table()

    def kernel(self, tensors: Tensors, n: int, k: int) -> Kernel | None:
        return self.inner.kernel(tensors, n, self._filled(k))
