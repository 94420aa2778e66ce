"""Evaluate a core a few heads at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["over_heads"]

_ELEMENTS = 2**19


def over_heads(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """``function(q, k, v)`` on slices of the heads, joined again.

    Heads do not see each other, so the result does not depend on the slices; temporaries of about
    2 MiB stay in cache and are not paged in anew by every operator. An exported graph is not cut.

    Args:
        function: maps q (B, h, N, K), k (B, h, M, K), v (B, h, M, V) to (B, h, N, V).
        q: (B, H, N, K).
        k: (B, H, M, K).
        v: (B, H, M, V).
    """
    if torch.compiler.is_exporting():
        return function(q, k, v)
    per_head = q.shape[0] * max(q.shape[2], k.shape[2]) * q.shape[3]
    size = max(2, _ELEMENTS // max(per_head, 1))  # two at least: products of one head use one core
    if size >= q.shape[1]:
        return function(q, k, v)
    slices = (x.split(size, dim=1) for x in (q, k, v))
    return torch.cat([function(*heads) for heads in zip(*slices, strict=True)], dim=1)
