"""Token sequences: checks, positions under padding as numbers and as vectors."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from effformer.checks import check_ids, check_mask, check_shape

__all__ = [
    "LearnedPositions",
    "Padding",
    "Positions",
    "SinusoidalPositions",
    "check_tokens",
    "draw_tokens",
    "make_positions",
    "sinusoids",
    "token_positions",
]

Padding = Literal["left", "right"]
Positions = Literal["sinusoidal", "learned", "none"]


def check_tokens(
    tokens: Tensor, mask: Tensor | None, vocab: int, *, where: str, longest: int | None = None
) -> None:
    """Check token ids (B, N) and their mask (B, N).

    Args:
        tokens: int64 or int32 ids.
        mask: bool, True = real token, or None.
        vocab: number of ids.
        where: the public entry point that was called.
        longest: most tokens that the model has positions for.

    Raises:
        TypeError: ids are not integers, or the mask is not bool.
        ValueError: a shape does not fit, an id is none of the vocabulary, or there are more tokens
            than positions.
    """
    check_shape(tokens, "(B, N)", (None, None), where=f"{where}: tokens")
    check_ids(tokens, vocab, where=f"{where}: tokens")
    if longest is not None and tokens.shape[1] > longest:
        raise ValueError(f"{where}: {tokens.shape[1]} tokens, but positions for {longest} only")
    if mask is not None:
        shape = tuple(tokens.shape)
        check_shape(mask, f"{shape}", shape, where=f"{where}: mask")
        check_mask(mask, where=f"{where}: mask")


def draw_tokens(
    table: nn.Embedding, batch: int, tokens: int, generator: torch.Generator | None = None
) -> Tensor:
    """Random ids (B, N) of a token table, none of them padding, on its device."""
    count, pad = table.num_embeddings, table.padding_idx
    device = table.weight.device
    if pad is None or count == 1:
        return torch.randint(0, count, (batch, tokens), device=device, generator=generator)
    ids = torch.randint(0, count - 1, (batch, tokens), device=device, generator=generator)
    return ids + (ids >= pad)


def token_positions(mask: Tensor, padding: Padding = "right") -> Tensor:
    """Position of every token, counted from the first one that is not padding in front.

    Args:
        mask: (B, N) bool, True = real token.
        padding: side of the padding; holes inside a sequence keep their place.

    Returns:
        (B, N) int64; meaningless, but >= 0, on padding.
    """
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if padding == "right":
        return columns
    return (columns - (mask.shape[1] - mask.sum(dim=1, keepdim=True))).clamp(min=0)


def sinusoids(positions: Tensor, dim: int, *, period: float = 1e4) -> Tensor:
    """``[sin(p w) | cos(p w)]`` with ``w_i = period^(-i / (dim/2 - 1))``; an odd dim ends with 0.

    Args:
        positions: integer or float positions of any shape (...).
        dim: width of a code, at least 4.
        period: ratio of the longest to the shortest wave.

    Returns:
        (..., dim) float32.

    Reference: the form of tensor2tensor and fairseq; Attention Is All You Need, 2017, arXiv
    1706.03762 divides by dim/2 instead.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device)
    angles = positions.unsqueeze(-1).float() * torch.exp(-math.log(period) / (half - 1) * steps)
    codes = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.nn.functional.pad(codes, (0, dim % 2))


class SinusoidalPositions(nn.Module):
    """``sinusoid(position + pad + 1)`` on real tokens, zero on padding.

    Args:
        dim: width of a code, at least 4.
        pad: id of padding; fairseq counts positions from the next number.
        padding: side of the padding.
    """

    def __init__(self, dim: int, *, pad: int, padding: Padding) -> None:
        super().__init__()
        self.dim, self.pad, self.padding = dim, pad, padding

    def forward(self, mask: Tensor) -> Tensor:
        """(B, N) bool, True = real token, to (B, N, D) float32."""
        codes = sinusoids(token_positions(mask, self.padding) + self.pad + 1, self.dim)
        return codes * mask.unsqueeze(-1)


class LearnedPositions(nn.Embedding):
    """Row ``position + pad + 1`` of a table on real tokens, row ``pad`` on padding.

    The table has ``context + pad + 1`` rows, as fairseq's; those below ``pad`` are never read.

    Args:
        dim: width of a code.
        context: number of positions, the most tokens of a sequence.
        pad: id of padding.
        padding: side of the padding.
    """

    def __init__(self, dim: int, *, context: int, pad: int, padding: Padding) -> None:
        super().__init__(context + pad + 1, dim, padding_idx=pad)
        self.context, self.pad, self.padding = context, pad, padding

    def forward(self, mask: Tensor) -> Tensor:
        """(B, N) bool, True = real token, to (B, N, D).

        Raises:
            ValueError: there are more tokens than positions.
        """
        if mask.shape[1] > self.context:
            raise ValueError(
                f"learned positions: {mask.shape[1]} tokens, but positions for {self.context} "
                "only; cut the sequence or build the model with a longer context"
            )
        places = token_positions(mask, self.padding) + self.pad + 1
        return super().forward(torch.where(mask, places, self.pad))


def make_positions(
    kind: Positions, dim: int, *, context: int, pad: int, padding: Padding
) -> SinusoidalPositions | LearnedPositions | None:
    """The module that gives tokens their positions, None for "none"; arguments as above."""
    if kind == "sinusoidal":
        return SinusoidalPositions(dim, pad=pad, padding=padding)
    if kind == "learned":
        return LearnedPositions(dim, context=context, pad=pad, padding=padding)
    return None
