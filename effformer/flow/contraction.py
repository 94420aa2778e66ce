"""Which maps of a flow of tokens need many Jacobi iterations, and from which guess."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import Shape, checked
from ..checks import check_values
from ..values import Count, NonNegative
from ..wrapped import unwrapping
from .inversion import Inversion, Start, TokenFlow, TokenMap, token_maps

__all__ = ["Contraction", "contractions", "inversion_plan"]


class Contraction(NamedTuple):
    """How a map behaves under Jacobi iteration.

    Attributes:
        from_latents: initial guess metric of the latents, ``|mean_B(G(z) - x)|`` with the iteration G
            and the spectral norm of a matrix (T, D).
        from_zeros: the same of the first token and zeros.
        rate: convergence ranking metric, ``|mean_B(exp(-log_scale) x)| |W_s| + |W_u|`` with the rows of
            the last matrix that make log-scales (W_s) and shifts (W_u): the larger, the slower.
    """

    from_latents: float
    from_zeros: float
    rate: float


@unwrapping
@checked
@torch.no_grad()
def contractions(
    model: TokenFlow, x: Annotated[Tensor, Shape("(B, C, H, W)")], **cond: Any
) -> tuple[Contraction, ...]:
    """Measure every map on some hundred training data.

    Args:
        model: a normalizing flow of token maps.
        x: (B, C, H, W) data.
        cond: conditions of the model; without labels its mean of all classes counts.

    Returns:
        One for every map, in the order of the model from the data to the latents; nan where values
        overflow.

    Raises:
        TypeError: the model is not made of such maps.

    Reference: Accelerating TarFlow Sampling with GS-Jacobi Iteration, 2025, arXiv 2505.12849.
    """
    check_values(x, where="contractions: x")
    maps = token_maps(model, x, cond, "contractions")
    tokens, found = model.tokens(x), []
    for one in maps:
        tokens = one.order(tokens)
        here = one.affine(tokens)
        alpha = torch.exp(-here.log_scale)
        z = alpha * (tokens - here.shift)
        zeros = torch.cat([tokens[:, :1], torch.zeros_like(tokens[:, 1:])], dim=1)
        scales, shifts = one.matrices()
        rate = _size(shifts)
        if scales is not None:
            rate += _size((alpha * tokens).mean(dim=0)) * _size(scales)
        found.append(Contraction(_missed(one, z, z, tokens), _missed(one, zeros, z, tokens), rate))
        tokens = one.order(z)
    return tuple(found)


@checked
def inversion_plan(
    found: Sequence[Contraction],
    *,
    tough: Count = 1,
    segment: Count = 32,
    iterations: Count = 32,
    elsewhere: Count = 10,
    tolerance: NonNegative = 1e-6,
) -> list[Inversion]:
    """How to invert every map of a model: those with the largest rate by GS-Jacobi in segments, the
    others by a few Jacobi iterations; each from the guess that is nearer.

    Args:
        found: what `contractions` measured.
        tough: number of maps in segments.
        segment: tokens in a segment.
        iterations: most iterations of a segment.
        elsewhere: most iterations of the other maps.
        tolerance: see `Inversion`.

    Returns:
        What `invert` takes.
    """
    rates = [one.rate if math.isfinite(one.rate) else math.inf for one in found]
    ranked = sorted(range(len(found)), key=lambda i: -rates[i])[:tough]
    plan = []
    for i, one in enumerate(found):
        start: Start = "latents" if one.from_latents <= one.from_zeros else "zeros"
        sizes = (segment, iterations) if i in ranked else (None, elsewhere)
        plan.append(
            Inversion(segment=sizes[0], iterations=sizes[1], tolerance=tolerance, start=start)
        )
    return plan


def _missed(one: TokenMap, guess: Tensor, z: Tensor, x: Tensor) -> float:
    """How far one iteration on a guess stays away from the tokens x, all in the map's order."""
    there = one.affine(guess)
    return _size((torch.exp(there.log_scale) * z + there.shift - x).mean(dim=0))


def _size(matrix: Tensor) -> float:
    """The spectral norm; nan of what is not finite."""
    if not bool(matrix.isfinite().all()):
        return math.nan
    return float(torch.linalg.matrix_norm(matrix.float(), ord=2))
