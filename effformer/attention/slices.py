"""Evaluate a part a few heads, a few tokens, or one sequence of a packed row, at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer.context import Context, Rope
from effformer.nn.lengths import is_fixed

__all__ = [
    "Rows",
    "capturing",
    "chunk_count",
    "known_length",
    "over_heads",
    "over_sequences",
    "padded",
    "pieces",
    "slices_of",
    "token_slices",
]

_ELEMENTS = 2**18


def capturing() -> bool:
    """True while `torch.export` or `torch.compile` captures a graph, which holds the operators of
    every turn of a loop.
    """
    return torch.compiler.is_exporting() or torch.compiler.is_compiling()


def known_length(x: Tensor) -> bool:
    """The number of tokens of x (B, H, N, K) may decide what runs; a graph that is captured for
    every length, exported or compiled, has one form for all of them.

    A form for unknown lengths must never have one chunk alone: tracers take a length of 1 for a
    constant. So it pads to one chunk more than it needs.
    """
    return not torch.compiler.is_compiling() or is_fixed(x.shape[2])


def chunk_count(x: Tensor, chunk: int) -> int:
    """Chunks of the tokens of x (B, H, N, K); where their number is not known, one more than it
    needs.

    It has no modulus: tracers carry the expression through every size, and prove each one.
    """
    return (x.shape[2] + chunk - 1) // chunk + (0 if known_length(x) else 1)


def padded(x: Tensor, more: int) -> Tensor:
    """X (B, H, N, K) with zeros behind its tokens.

    A graph pads a contiguous copy: where ``more`` turns out to be 0, padding keeps strides that torch
    took for contiguous ones while it captured.
    """
    return F.pad(x.contiguous() if capturing() else x, (0, 0, 0, more))


def over_heads(
    function: Callable[[Tensor, Tensor, Tensor, slice], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """``function(q, k, v, heads)`` on slices of the heads, joined again.

    Heads do not see each other, so the result does not depend on the slices; temporaries of about
    1 MiB for each thread stay in cache and are not paged in anew by every operator. A graph for every length is not
    cut.

    Args:
        function: maps q (B, h, N, K), k (B, h, M, K), v (B, h, M, V), and the slice of the heads that
            they are, to (B, h, N, V).
        q: (B, H, N, K).
        k: (B, H, M, K).
        v: (B, H, M, V).
    """
    if torch.compiler.is_exporting() or not (known_length(q) and known_length(k)):
        return function(q, k, v, slice(None))
    per_head = q.shape[0] * max(q.shape[2], k.shape[2]) * q.shape[3]
    size = max(
        2, _elements(q.device) // max(per_head, 1)
    )  # two at least: products of one head use one core
    if size >= q.shape[1]:
        return function(q, k, v, slice(None))
    outputs = Rows(q.shape[1], dim=1)
    cut = (x.split(size, dim=1) for x in (q, k, v))
    for i, (some_q, some_k, some_v) in enumerate(zip(*cut, strict=True)):
        outputs.append(function(some_q, some_k, some_v, slice(i * size, (i + 1) * size)))
    return outputs.joined()


def _elements(device: torch.device) -> int:
    """Elements of a temporary: on a CPU what stays in the cache of each thread, elsewhere what memory
    bears, because every slice there costs its launches. The fewer slices, the fewer operators at whose
    end threads wait for each other.
    """
    if device.type != "cpu":
        return 512 * _ELEMENTS
    return _ELEMENTS if torch.compiler.is_compiling() else _ELEMENTS * torch.get_num_threads()


def token_slices(tokens: int, width: int, *, device: torch.device, least: int = 64) -> list[slice]:
    """Slices of the tokens for parts that treat them one by one, or sum over them.

    Temporaries of ``width`` elements per token then stay in cache: beyond it a linear part would
    take more than twice the time for twice the tokens. A graph is not cut, see `capturing`.

    Args:
        tokens: number of tokens, or of chunks of them.
        width: elements that the part computes for each.
        device: where it computes them.
        least: fewest tokens in a slice; all slices but the last hold a multiple of it.
    """
    if capturing():
        return [slice(None)]
    size = max(1, _elements(device) // (max(width, 1) * least)) * least
    starts = range(0, max(tokens, 1), size)
    return [slice(start, min(start + size, tokens)) for start in starts]


def slices_of(x: Tensor) -> list[slice]:
    """`token_slices` for a part whose temporaries are as large as x (B, H, N, K)."""
    return token_slices(x.shape[2], x.shape[0] * x.shape[1] * x.shape[3], device=x.device)


def pieces(x: Tensor, slices: list[slice]) -> tuple[Tensor, ...]:
    """The tokens of x (B, H, N, ...) slice by slice.

    Backward, the gradients of the pieces are joined once, where each ``x[:, :, rows]`` would add a
    gradient as large as x.
    """
    if len(slices) == 1:
        return (x,)
    return x.split([rows.stop - rows.start for rows in slices], dim=2)


class Rows:
    """Pieces of an output, put together along a dimension.

    While gradients are recorded they are joined at the end. Otherwise each goes to its place at
    once: a list of them would take the memory of the result again, which every call pages in anew.

    Args:
        size: length of the dimension, of all pieces together.
        dim: the dimension; 2 holds the tokens of (B, H, N, V).
    """

    def __init__(self, size: int, dim: int = 2) -> None:
        self.size, self.dim, self.filled = size, dim, 0
        self.parts: list[Tensor] = []

    def append(self, piece: Tensor) -> None:
        """Add the next piece."""
        length = piece.shape[self.dim]
        keep = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if keep or length == self.size:
            self.parts.append(piece)
            return
        if not self.parts:
            shape = list(piece.shape)
            shape[self.dim] = self.size
            self.parts.append(piece.new_empty(shape))
        self.parts[0].narrow(self.dim, self.filled, length).copy_(piece)
        self.filled += length

    def joined(self) -> Tensor:
        """All of them."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=self.dim)


def over_sequences(
    function: Callable[[Tensor, Rope | None], Tensor], x: Tensor, ctx: Context
) -> Tensor:
    """``function(one, rope)`` on each sequence of a packed row x (1, T, D), joined again; ``rope``
    are the rotary tables of its tokens.

    Neighbours of equal length run as one batch.

    Raises:
        ValueError: x is not one row of all real tokens.
    """
    packing = ctx.packing
    assert packing is not None
    packing.check_row(x)
    outputs, start = [], 0
    for count, length in packing.runs:
        rows = slice(start, start + count * length)
        turns = None if ctx.rope is None else ctx.rope.tokens(rows).batch(count)
        outputs.append(function(x[0, rows].unflatten(0, (count, length)), turns).flatten(0, 1))
        start = rows.stop
    return torch.cat(outputs)[None] if outputs else x
