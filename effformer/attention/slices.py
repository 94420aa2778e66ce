"""Evaluate a part a few tokens, or one sequence of a packed row, at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effformer.context import Packing

__all__ = ["Rows", "over_sequences", "pieces", "token_slices"]

_ELEMENTS = 2**18


def token_slices(tokens: int, width: int, *, least: int = 64) -> list[slice]:
    """Slices of the tokens for parts that treat them one by one, or sum over them.

    Temporaries of ``width`` elements per token then stay in cache: beyond it a linear part would
    take more than twice the time for twice the tokens. An exported graph is not cut.

    Args:
        tokens: number of tokens, or of chunks of them.
        width: elements that the part computes for each.
        least: fewest tokens in a slice; all slices but the last hold a multiple of it.
    """
    if torch.compiler.is_exporting():
        return [slice(None)]
    size = max(1, _ELEMENTS // (max(width, 1) * least)) * least
    starts = range(0, max(tokens, 1), size)
    return [slice(start, min(start + size, tokens)) for start in starts]


def pieces(x: Tensor, slices: list[slice]) -> tuple[Tensor, ...]:
    """The tokens of x (B, H, N, ...) slice by slice.

    Backward, the gradients of the pieces are joined once, where each ``x[:, :, rows]`` would add a
    gradient as large as x.
    """
    if len(slices) == 1:
        return (x,)
    return x.split([rows.stop - rows.start for rows in slices], dim=2)


class Rows:
    """Pieces of an output, put together along the tokens.

    While gradients are recorded they are joined at the end. Otherwise each goes to its place at
    once: a list of them would take the memory of the result again, which every call pages in anew.

    Args:
        tokens: number of tokens of all pieces.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.filled = tokens, 0
        self.parts: list[Tensor] = []

    def append(self, piece: Tensor) -> None:
        """Add the next piece (B, H, n, V)."""
        keep = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if keep or piece.shape[2] == self.tokens:
            self.parts.append(piece)
            return
        if not self.parts:
            batch, heads, _, width = piece.shape
            self.parts.append(piece.new_empty(batch, heads, self.tokens, width))
        end = self.filled + piece.shape[2]
        self.parts[0][:, :, self.filled : end] = piece
        self.filled = end

    def joined(self) -> Tensor:
        """All of them, (B, H, N, V)."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=2)


def over_sequences(function: Callable[[Tensor], Tensor], x: Tensor, packing: Packing) -> Tensor:
    """``function`` on each sequence of a packed row x (1, T, D), joined again.

    Neighbours of equal length run as one batch.

    Raises:
        ValueError: x is not one row of all real tokens.
    """
    packing.check_row(x)
    outputs, start = [], 0
    for count, length in packing.runs:
        batch = x[0, start : start + count * length].unflatten(0, (count, length))
        outputs.append(function(batch).flatten(0, 1))
        start += count * length
    return torch.cat(outputs)[None] if outputs else x
