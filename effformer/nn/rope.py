"""Rotary position embedding (RoPE)."""

from __future__ import annotations

import torch
from torch import Tensor

from effformer.context import Rope

__all__ = ["apply_rope", "rotate"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the pairs of the last dimension; x (B, H, N, K), tables (N, K)."""
    if interleaved:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return x * cos + turned * sin


def apply_rope(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys (B, H, N, K).

    Reference: RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv
    2104.09864.
    """
    key_cos = rope.cos if rope.key_cos is None else rope.key_cos
    key_sin = rope.sin if rope.key_sin is None else rope.key_sin
    q = rotate(q, rope.cos, rope.sin, interleaved=rope.interleaved)
    return q, rotate(k, key_cos, key_sin, interleaved=rope.interleaved)
