"""Legendre memory: the last ``theta`` samples of a signal as coefficients of Legendre polynomials."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .lengths import is_fixed
from .precision import exactly

__all__ = ["LegendreMemory", "legendre_system"]

_VANISHED = 1e-10
_DIRECT = 160
"""Longest response that is convolved by a matrix product; longer ones go through Fourier space.
Measured on one core: the two forms meet at about 130 samples for q = 32, and 200 for q = 256."""


@functools.lru_cache(maxsize=32)
def legendre_system(order: int, theta: float) -> tuple[Tensor, Tensor]:
    """Transition (q, q) and input (q,) of the memory for steps of one sample, in float64.

    With i, j = 0..q-1 the continuous system is ``A_ij = (2i + 1) / theta (-1 if i < j else
    (-1)^(i-j+1))``, ``b_i = (2i + 1) / theta (-1)^i``. A signal that is constant over each step
    (zero-order hold) gives exactly ``exp(A)`` and ``A^-1 (exp(A) - 1) b``.

    Args:
        order: q, number of coefficients.
        theta: length of the window in samples.

    Reference: Legendre Memory Units: Continuous-Time Representation in Recurrent Neural Networks,
    2019, NeurIPS 32.
    """
    # the device is named, so that a model built under torch.device("meta") has numbers, too
    i = torch.arange(order, dtype=torch.float64, device="cpu")
    sign = 1 - 2 * (i % 2)
    lower = -sign[:, None] * sign
    rate = (2 * i[:, None] + 1) / theta
    a = rate * torch.where(i[:, None] < i, -torch.ones_like(lower), lower)
    b = rate[:, 0] * sign
    transition = torch.linalg.matrix_exp(a)
    return transition, torch.linalg.solve(a, transition @ b - b)


@functools.lru_cache(maxsize=32)
def _response(order: int, theta: float) -> Tensor:
    """Answer (R, q) to an impulse, ``H_t = Ad^t bd``, until it has died out."""
    power, start = legendre_system(order, theta)
    response = start[None]
    while True:
        rest = response @ power.T
        peak = response.abs().max()
        if len(response) > theta and rest.abs().max() < _VANISHED * peak:
            break
        response, power = torch.cat([response, rest]), power @ power
    alive = response.abs().amax(dim=1).flip(0).cummax(dim=0).values.flip(0) > _VANISHED * peak
    return response[: int(alive.sum())].clone()


class LegendreMemory(nn.Module):
    """Memory of a scalar signal: ``m_t = Ad m_(t-1) + bd u_t`` with ``m_(-1) = 0``.

    m holds the coefficients of shifted Legendre polynomials that approximate u over the last
    ``theta`` samples. Nothing is learned. Three forms give the same numbers:

    - `step`: the recurrence, q^2 + q multiply-adds per sample;
    - a causal convolution with the response ``H_t = Ad^t bd`` as one matrix product;
    - the same convolution in Fourier space, in blocks that overlap.

    `forward` convolves, directly if the response or the signal is short. The eigenvalues of Ad lie
    inside the unit circle, so H dies out: after `reach` samples (about twice theta for high orders)
    every entry is below 1e-10 of the largest one, and one kernel of this length serves signals of any
    length. An exported graph holds this kernel in an ordinary convolution.

    The matrices come from float64 and are never saved. They are kept in float32 at least: a cast of
    the module computes them again instead of rounding them.

    Args:
        order: q, number of coefficients.
        theta: length of the window in samples.

    Raises:
        ValueError: order below 1, or theta below 1.

    Reference: Legendre Memory Units: Continuous-Time Representation in Recurrent Neural Networks,
    2019, NeurIPS 32; Parallelizing Legendre Memory Unit Training, 2021, arXiv 2102.11417.
    """

    transition: Tensor
    write: Tensor
    response: Tensor

    def __init__(self, order: int, theta: float) -> None:
        super().__init__()
        if order < 1 or not 1 <= theta < math.inf:
            raise ValueError(
                f"legendre memory: order and theta must be at least 1, got {order} and {theta}"
            )
        self.order = order
        self.theta = float(theta)
        transition, write = legendre_system(order, self.theta)
        exact = {
            "transition": transition, "write": write, "response": _response(order, self.theta)
        }  # fmt: skip
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
        for name, value in exact.items():
            self.register_buffer(name, value.to(device, dtype), persistent=False)

    @property
    def reach(self) -> int:
        """Number of samples after which an impulse is forgotten."""
        return self.response.shape[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.reset_buffers()
        return self

    def reset_buffers(self) -> None:
        """Compute the matrices again, where they are."""
        transition, write = legendre_system(self.order, self.theta)
        dtype = torch.promote_types(self.response.dtype, torch.float32)
        self.transition = transition.to(self.transition.device, dtype)
        self.write = write.to(self.write.device, dtype)
        self.response = _response(self.order, self.theta).to(self.response.device, dtype)

    def forward(self, u: Tensor) -> Tensor:
        """Coefficients (B, N, q) after every sample of u (B, N)."""
        with exactly(u):
            return self._coefficients(u.to(self.response.dtype)).to(u.dtype)

    def _coefficients(self, u: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return self.convolve(u)
        if self._taps(u) <= _DIRECT:
            return self.multiply(u)
        return self.transform(u)

    def convolve(self, u: Tensor) -> Tensor:
        """One convolution operator with the whole kernel, whatever the length of u (B, N)."""
        kernel = self.response.flip(0).T[:, None]
        return F.conv1d(F.pad(u, (self.reach - 1, 0))[:, None], kernel).transpose(1, 2)

    def multiply(self, u: Tensor) -> Tensor:
        """Every sample's past, u (B, N) as (B, N, K), times the response (K, q)."""
        taps = self._taps(u)
        return F.pad(u, (taps - 1, 0)).unfold(1, taps, 1) @ self.response[:taps].flip(0)

    def transform(self, u: Tensor) -> Tensor:
        """Blocks of u (B, N) in Fourier space.

        A block is twice as long as the response, so that the circular convolution is the causal one
        on its last ``hop`` samples.
        """
        n, taps = u.shape[1], self._taps(u)
        length, hop, blocks = _blocks(n, taps)
        padded = F.pad(u, (length - hop, blocks * hop - n))
        spectrum = torch.fft.rfft(self.response[:taps].T, n=length)
        product = torch.fft.rfft(padded.unfold(1, length, hop))[:, :, None] * spectrum
        m = torch.fft.irfft(product, n=length)[..., length - hop :]
        return m.transpose(2, 3).flatten(1, 2)[:, :n]

    def step(self, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence on the next samples.

        Args:
            u: (B, n) samples.
            m: (B, q) coefficients before them.

        Returns:
            Coefficients (B, n, q) after every sample, and the last of them (B, q).
        """
        rows = []
        with exactly(u):
            for sample in u.to(self.write.dtype).unbind(1):
                m = torch.addmm(torch.outer(sample, self.write), m, self.transition.T)
                rows.append(m)
        return torch.stack(rows, dim=1).to(u.dtype), m

    def init_state(self, batch: int) -> Tensor:
        """The empty memory (B, q)."""
        return self.write.new_zeros(batch, self.order)

    def macs(self, n: int) -> int:
        """Multiply-adds of `forward` on n samples; a real Fourier transform of length L is counted
        as 5/4 L log2 L.
        """
        taps = min(n, self.reach)
        length, _, blocks = _blocks(n, taps)
        if taps <= _DIRECT:
            return n * taps * self.order
        return blocks * (1 + self.order) * round(1.25 * length * math.log2(length))

    def _taps(self, u: Tensor) -> int:
        """How much of the response meets u (B, N); a graph for every length holds all of it."""
        known = not torch.compiler.is_compiling() or is_fixed(u.shape[1])
        return min(u.shape[1], self.reach) if known else self.reach

    def extra_repr(self) -> str:
        return f"order={self.order}, theta={self.theta:g}"


def _blocks(n: int, taps: int) -> tuple[int, int, int]:
    """Length of a block, new samples per block, number of blocks."""
    length = 1 << (2 * taps - 1).bit_length()
    hop = length - taps + 1
    return length, hop, -(-n // hop)
