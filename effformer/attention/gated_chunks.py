"""Chunks of the gated linear recurrence: decays inside a chunk, the delta rule's solve, states
between chunks.

Every exponent is a sum of log decays, never a difference of two sums, so that no decay is too
strong: ``exp(-inf) = 0`` is an ordinary value here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends import carries_tangents

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
            left=False, unitriangular=True,
        )  # fmt: skip
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grads[0] @ inverse.mT).tril(-1)


def unit_lower_inverse(m: Tensor) -> Tensor:
    """``(I + M)^-1`` of what stands below the diagonal of M (..., C, C)."""
    if carries_tangents(m):
        return torch.linalg.inv(m.tril(-1) + torch.eye(m.shape[-1], dtype=m.dtype, device=m.device))
    return _Inverse.apply(m)


def _chunk_by_chunk(count: int, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of every part (c Z, ...) the Z = count rows of one chunk after another; none in an empty batch."""
    return zip(*(x.split(count) for x in parts), strict=True) if count else iter(())


def chunk_states(
    write: Tensor, read: Tensor | None, whole: Tensor, u: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """``U_c = u_c + R_c S_c;  S_{c+1} = diag(d_c) S_c + W_c U_c`` over the chunks c of Z sequences.

    An operator of its own: a captured graph then serves any number of chunks, and no (K, K)
    transition of a chunk is made. Forward-mode derivatives take the formula.

    Args:
        write: W, (c Z, K, C).
        read: R, (c Z, C, K), None for 0.
        whole: d, (c Z, K, 1), or (c Z, 1, 1) for all K alike.
        u: (c Z, C, V).
        start: S_0, (Z, K, V).

    Returns:
        Every state, S_0 and the last included, ((c + 1) Z, K, V), and U (c Z, C, V).
    """
    if not carries_tangents(write, read, whole, u, start):
        states, gains = _chunk_states(write, read, whole, u, start)
        return states, gains
    count, rows, found = start.shape[0], [start], [u[:0]]
    for c, (w, d, gain) in enumerate(_chunk_by_chunk(count, write, whole, u)):
        if read is not None:
            gain = gain + read.narrow(0, c * count, count) @ rows[-1]
        found.append(gain)
        rows.append(rows[-1] * d + w @ gain)
    return torch.cat(rows), torch.cat(found)


@torch.library.custom_op("effformer::chunk_states", mutates_args=())
def _chunk_states(
    write: Tensor, read: Tensor | None, whole: Tensor, u: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """`chunk_states` as one operator."""
    count, chunks = start.shape[0], u.shape[0]
    states = start.new_empty(count + chunks, *start.shape[1:])
    rows, u = states.split(count), u.clone(memory_format=torch.contiguous_format)
    rows[0].copy_(start)
    for c, (w, d, gain) in enumerate(_chunk_by_chunk(count, write, whole, u)):
        if read is not None:
            gain.baddbmm_(read.narrow(0, c * count, count), rows[c])
        torch.mul(rows[c], d, out=rows[c + 1]).baddbmm_(w, gain)
    return states, u


@_chunk_states.register_fake
def _(
    write: Tensor, read: Tensor | None, whole: Tensor, u: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    states = start.new_empty(start.shape[0] + u.shape[0], *start.shape[1:])
    return states, torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op("effformer::chunk_states_backward", mutates_args=())
def _chunk_states_backward(
    write: Tensor, read: Tensor | None, whole: Tensor, grad_states: Tensor, grad_u: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of all states and of U, what later ones hand back included."""
    count = grad_states.shape[0] - grad_u.shape[0]
    states, u = (x.clone(memory_format=torch.contiguous_format) for x in (grad_states, grad_u))
    rows = states.split(count)
    for c, (w, d, gain) in reversed(list(enumerate(_chunk_by_chunk(count, write, whole, u)))):
        gain.baddbmm_(w.mT, rows[c + 1])
        rows[c].addcmul_(d, rows[c + 1])
        if read is not None:
            rows[c].baddbmm_(read.narrow(0, c * count, count).mT, gain)
    return states, u


@_chunk_states_backward.register_fake
def _(
    write: Tensor, read: Tensor | None, whole: Tensor, grad_states: Tensor, grad_u: Tensor
) -> tuple[Tensor, Tensor]:
    states, u = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (grad_states, grad_u)
    )
    return states, u


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    write, read, whole, states, u = ctx.saved_tensors
    total, grad_u = _chunk_states_backward(write, read, whole, *grads)
    chunks = u.shape[0]
    count = total.shape[0] - chunks
    later, before = total.narrow(0, count, chunks), states.narrow(0, 0, chunks)
    grad_read = None if read is None else grad_u @ before.mT
    grad_whole = (later * before).sum_to_size(whole.shape)
    return later @ u.mT, grad_read, grad_whole, grad_u, total.narrow(0, 0, count)


_chunk_states.register_autograd(_differentiate, setup_context=_save)
