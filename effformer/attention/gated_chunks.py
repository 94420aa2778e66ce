"""Chunks of the gated linear recurrence: decays inside a chunk, the delta rule's solve, states
between chunks.

Every exponent is a sum of log decays, never a difference of two sums, so that no decay is too
strong: ``exp(-inf) = 0`` is an ordinary value here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Decays", "chunk_states", "decayed_scores", "decays", "unit_lower_inverse"]


class Decays(NamedTuple):
    """Decays of one chunk of C tokens.

    Attributes:
        before: from the state before the chunk to token i, (..., C, 1) or (..., C, K).
        after: from token i to the last one, (..., C, 1) or (..., C, K).
        whole: from the state before the chunk to the last token, (..., 1) or (..., K).
    """

    before: Tensor
    after: Tensor
    whole: Tensor


def decays(g: Tensor) -> tuple[Decays, Tensor]:
    """One log decay per token, g (..., C): the decays, and ``w_ij = exp(sum_{j < m <= i} g_m)`` for
    j <= i, else 0, (..., C, C).
    """
    size = g.shape[-1]
    sums = g.unsqueeze(-1).expand(*g.shape, size).tril(-1).cumsum(dim=-2)
    weights = sums.exp().tril()  # above the diagonal: exp(0), then 0
    before = (sums[..., 0] + g[..., :1]).exp()
    return Decays(before.unsqueeze(-1), weights[..., -1, :, None], before[..., -1:]), weights


def decayed_scores(left: Tensor, k: Tensor, g: Tensor) -> tuple[Decays, Tensor]:
    """One log decay per token and key channel: ``sum_d left_id k_jd exp(sum_{j < m <= i} g_md)``.

    Blocks of 1, 2, 4, ... tokens are joined in pairs. Anchored at the seam of the pair, the decay
    splits into a factor of the row and a factor of the column, both at most 1.

    Args:
        left: (Z, C, R, K), R rows for every token; C is a power of 2.
        k: (Z, C, K).
        g: (Z, C, K).

    Returns:
        The decays, and the scores for j <= i, else 0, (Z, C, R, C).
    """
    size, block = left.shape[1], 1
    since, until = g, torch.zeros_like(g)  # log decays inside the block: up to i, after i
    scores = (left * k.unsqueeze(2)).sum(dim=-1)[:, :, None, :, None]
    while block < size:
        pairs = (size // (2 * block), 2)
        first, second = since.unflatten(1, (*pairs, block)).unbind(2)
        first_until, second_until = until.unflatten(1, (*pairs, block)).unbind(2)
        rows = left.unflatten(1, (*pairs, block))[:, :, 1] * second.exp().unsqueeze(3)
        columns = k.unflatten(1, (*pairs, block))[:, :, 0] * first_until.exp()
        cross = (rows.flatten(2, 3) @ columns.mT).unflatten(2, (block, -1))
        upper, lower = scores.unflatten(1, pairs).unbind(2)
        scores = torch.cat([F.pad(upper, (0, block)), torch.cat([cross, lower], -1)], 2)
        since = torch.cat([first, second + first[:, :, -1:]], 2).flatten(1, 2)
        until = torch.cat([first_until + second[:, :, -1:], second_until], 2).flatten(1, 2)
        block *= 2
    return Decays(since.exp(), until.exp(), since[:, -1].exp()), scores.squeeze(1)


class _Inverse(torch.autograd.Function):
    """``T = (I + M)^-1``, M below the diagonal; ``dM = -T^T dT T^T``."""

    @staticmethod
    def forward(ctx: Any, m: Tensor) -> Tensor:
        inverse = torch.linalg.solve_triangular(
            m, torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand_as(m), upper=False,
            unitriangular=True,
        )  # fmt: skip
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grads[0] @ inverse.mT).tril(-1)


def unit_lower_inverse(m: Tensor) -> Tensor:
    """``(I + M)^-1`` of what stands below the diagonal of M (..., C, C)."""
    return _Inverse.apply(m)


@torch.library.custom_op("effformer::chunk_states", mutates_args=())
def chunk_states(transition: Tensor, write: Tensor, start: Tensor) -> Tensor:
    """``S_{c+1} = P_c S_c + W_c`` over the chunks c of Z sequences.

    An operator of its own: a captured graph then serves any number of chunks.

    Args:
        transition: P, a matrix (c Z, K, K) or a diagonal (c Z, K, 1).
        write: W, (c Z, K, V).
        start: S_0, (Z, K, V).

    Returns:
        Every state, S_0 and the last included, ((c + 1) Z, K, V).
    """
    count = start.shape[0]
    states = torch.cat([start, torch.empty_like(write)])
    rows = states.split(count)
    add = torch.addcmul if transition.shape[-1] == 1 else torch.baddbmm
    for c, (w, p) in enumerate(zip(write.split(count), transition.split(count), strict=True)):
        add(w, p, rows[c], out=rows[c + 1])
    return states


@chunk_states.register_fake
def _(transition: Tensor, write: Tensor, start: Tensor) -> Tensor:
    return torch.cat([start, write])


@torch.library.custom_op("effformer::chunk_states_backward", mutates_args=())
def _chunk_states_backward(grad: Tensor, transition: Tensor) -> Tensor:
    """The gradients of all states, what later ones hand back included, ((c + 1) Z, K, V)."""
    count = grad.shape[0] - transition.shape[0]
    total = grad.clone(memory_format=torch.contiguous_format)
    rows = total.split(count)
    add = torch.addcmul if transition.shape[-1] == 1 else torch.baddbmm
    for c, p in reversed(list(enumerate(transition.split(count)))):
        add(rows[c], p.mT if p.shape[-1] > 1 else p, rows[c + 1], out=rows[c])
    return total


@_chunk_states_backward.register_fake
def _(grad: Tensor, transition: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    transition, states = ctx.saved_tensors
    total = _chunk_states_backward(grad, transition)
    chunks = transition.shape[0]
    count = grad.shape[0] - chunks
    later, before = total.narrow(0, count, chunks), states.narrow(0, 0, chunks)
    if transition.shape[-1] == 1:
        moved = (later * before).sum(dim=-1, keepdim=True)
    else:
        moved = later @ before.mT
    return moved, later, total.narrow(0, 0, count)


chunk_states.register_autograd(_differentiate, setup_context=_save)
