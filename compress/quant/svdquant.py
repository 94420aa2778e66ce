"""SVDQuant: a small branch in 16 bit takes what 4 bits cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer import registry
from effformer.config import Config, part
from effformer.values import Count, Fraction

from .calibrate import Seen
from .schemes import Layout, Scheme, Tensors
from .symmetric import W4A4

__all__ = ["Branches", "SVDQuant", "decompose", "smoothing"]


class Branches(NamedTuple):
    """A weight as a low-rank product and a rounded rest.

    Attributes:
        down: (r, K).
        up: (N, r); the product ``up @ down`` is the branch.
        rest: tensors of the rest.
        errors: of every iteration.
        best: the iteration that was taken.
    """

    down: Tensor
    up: Tensor
    rest: dict[str, Tensor]
    errors: list[float]
    best: int


def smoothing(peak: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """``max|x|^alpha / max|w|^beta`` per channel, 1 where that is 0 or infinite."""
    s = peak**alpha / weight.abs().amax(0) ** beta
    return torch.where((s > 0) & s.isfinite(), s, torch.ones_like(s))


def decompose(
    weight: Tensor,
    rank: int,
    scheme: Scheme,
    error: Callable[[Tensor, Tensor, dict[str, Tensor]], float],
    *,
    iterations: int,
    dtype: torch.dtype = torch.float32,
) -> Branches:
    """In turn: the branch is the best of its rank for what rounding left over, rounding takes what the
    branch leaves; until the error rises.

    Args:
        weight: (N, K) float32.
        rank: of the branch.
        scheme: rounds the rest.
        error: of (down, up, rest tensors).
        iterations: most turns.
        dtype: of the branch.
    """
    n, k = weight.shape
    decoded, errors = torch.zeros_like(weight), list[float]()
    found: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None
    best = 0
    for i in range(iterations):
        u, s, v = torch.linalg.svd((weight - decoded).double(), full_matrices=False)
        down, up = v[:rank].to(dtype), (u[:, :rank] * s[:rank]).to(dtype)
        rest = scheme.encode(weight - up.float() @ down.float())
        errors.append(error(down, up, rest))
        if found is not None and errors[-1] > errors[best]:
            break
        found, best = (down, up, rest), i
        decoded = scheme.decode(rest, n, k)
    assert found is not None
    return Branches(*found, errors, best)


@registry.quantizer.register("svdquant", paper="2411.05007")
class SVDQuant(Scheme):
    """4-bit weights and inputs beside a branch of low rank: ``Q(x / s) Q(W s - L)^T + (x / s) L^T`` with
    ``L = up @ down`` in 16 bit, whose inputs are smoothed but not rounded.

    s is ``max|x|^a / max|w|^b``, (a, b) searched among (0, 0), (i / 20, 0) and (i / 20, 1 - i / 20) by
    the error of the output without a branch. Errors are those on a sample of the calibration tokens.

    Differs from the paper: the rest may be stored in any scheme that needs no data.

    Reference: SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models, 2024, arXiv
        2411.05007.
    """

    name, by_row, prepares, wants = "svdquant", False, True, ("peak", "sample")
    config: SVDQuant.Config

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Config):
        """Knobs of `SVDQuant`.

        Attributes:
            scheme: how the rest is stored.
            rank: of the branch; at most half of the smaller side of a weight is used.
            alpha: exponent of the inputs' ranges, None to search both exponents.
            beta: exponent of the weight's ranges, None to search both.
            iterations: most turns of branch and rest.
        """

        scheme: Config = part("quantizer", W4A4.Config())
        rank: Count = 32
        alpha: Fraction | None = None
        beta: Fraction | None = None
        iterations: Count = 100

        def check(self) -> None:
            if (self.alpha is None) != (self.beta is None):
                raise ValueError("alpha and beta are given together, or both searched")
            if wants := self.scheme.build().wants:
                raise ValueError(
                    f"scheme {self.scheme.entry.name!r} needs calibration data ({wants[0]}); the rest "
                    "is rounded without: w4a4, w8a8, affine or int4 would do"
                )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner: Scheme = config.scheme.build()
        self.bits, self.step = self.inner.bits, self.inner.step

    def rank(self, n: int, k: int) -> int:
        """Rank of the branch of a (n, k) weight."""
        return max(1, min(self.config.rank, n // 2, k // 2))

    def layout(self, n: int, k: int) -> Layout:
        rank = self.rank(n, k)
        return self.inner.layout(n, k) | {
            "smooth": ((k,), torch.float32),
            "down": ((rank, k), torch.float16),
            "up": ((n, rank), torch.float16),
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return self.fit(weight, None)

    def fit(self, weight: Tensor, seen: Seen | None) -> dict[str, Tensor]:
        w = weight.detach().float()
        n, k = w.shape
        if seen is None or seen.sample is None or seen.peak is None:
            x, s = torch.eye(k, device=w.device), torch.ones(k, device=w.device)
        else:
            x, peak = seen.sample.to(w.device), seen.peak.to(w.device)
            s = self._searched(w, x, peak)
        exact, smooth = x @ w.t(), x / s

        def error(down: Tensor, up: Tensor, rest: dict[str, Tensor]) -> float:
            made = self._sum(smooth, rest | {"down": down, "up": up}, n, k)
            return float((made - exact).double().square().sum())

        made = decompose(
            w * s, self.rank(n, k), self.inner, error,
            iterations=self.config.iterations, dtype=torch.float16,
        )  # fmt: skip
        return {**made.rest, "smooth": s, "down": made.down, "up": made.up}

    def _searched(self, w: Tensor, x: Tensor, peak: Tensor) -> Tensor:
        if self.config.alpha is not None and self.config.beta is not None:
            return smoothing(peak, w, self.config.alpha, self.config.beta)
        steps = [i / 20 for i in range(1, 20)]
        pairs = [(0.0, 0.0), *((a, 0.0) for a in steps), *((a, 1 - a) for a in steps)]
        exact, (n, k) = x @ w.t(), w.shape

        def error(s: Tensor) -> float:
            made = self.inner.linear(x / s, self.inner.encode(w * s), n, k)
            return float((made - exact).double().square().sum())

        return min((smoothing(peak, w, a, b) for a, b in pairs), key=error)

    def _sum(self, smooth: Tensor, tensors: Tensors, n: int, k: int) -> Tensor:
        """Both branches of smoothed inputs."""
        down, up = tensors["down"].to(smooth.dtype), tensors["up"].to(smooth.dtype)
        rest = self.inner.linear(smooth, tensors, n, k)
        return rest + F.linear(F.linear(smooth, down), up)

    def linear(self, x: Tensor, tensors: Tensors, n: int, k: int) -> Tensor:
        s = (1.0 / tensors["smooth"].float()).to(x.dtype)
        return self._sum(x * s, tensors, n, k)

    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        branch = tensors["up"].float() @ tensors["down"].float()
        return (self.inner.decode(tensors, n, k) + branch) / tensors["smooth"].float()

    def macs(self, n: int, k: int) -> int:
        return self.inner.macs(n, k) + self.rank(n, k) * (n + k)

    def of_table(self) -> Scheme:
        return self.inner.of_table()
