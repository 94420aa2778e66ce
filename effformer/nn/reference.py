"""The slow obvious versions of what `effformer.nn` does fast: loops in float64, no cleverness."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_reference", "proportional_attention_reference"]


def merge_reference(
    metric: Tensor, x: Tensor, sizes: Tensor, r: int, *, front: int = 0
) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching and size-weighted means, token by token.

    Args:
        metric: (N, K) of one sample.
        x: (N, D) tokens.
        sizes: (N,) how many tokens each stands for.
        r: number of merges, at most ``(N - front) // 2``.
        front: protected tokens at the front.

    Returns:
        Merged tokens (M, D) and their sizes (M,), in the order of
        `effformer.nn.merging.match_tokens`.
    """
    metric, x, sizes = metric.double(), x.double(), sizes.double()
    n = len(x)
    found = []
    for a in range(0, n, 2):
        if a < front:
            continue
        cosines = [
            (float(metric[a] @ metric[b] / metric[a].norm() / metric[b].norm()), b)
            for b in range(1, n, 2)
            if b >= front
        ]
        cosine, b = max(cosines, key=lambda pair: pair[0])
        found.append((cosine, a, b))
    found.sort(key=lambda pair: -pair[0])
    members = {i: [i] for i in range(n)}
    for _, a, b in found[:r]:
        members[b] += members.pop(a)
    left = [a for _, a, _ in found[r:]]
    if front:
        left.sort()
    order = [*range(front), *left, *(b for b in range(1, n, 2) if b >= front)]
    tokens, totals = [], []
    for token in order:
        total, weighted = sizes.new_zeros(()), x.new_zeros(x.shape[1])
        for i in members[token]:
            total = total + sizes[i]
            weighted = weighted + sizes[i] * x[i]
        tokens.append(weighted / total)
        totals.append(total)
    return torch.stack(tokens), torch.stack(totals)


def proportional_attention_reference(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> Tensor:
    """Softmax attention to keys that stand for several equal ones: every key and value is written
    out as often as its size says.

    Args:
        q: (N, K) of one head.
        k: (M, K).
        v: (M, V).
        sizes: (M,) whole numbers.
    """
    copies = [j for j, size in enumerate(sizes.tolist()) for _ in range(round(size))]
    keys, values = k.double()[copies], v.double()[copies]
    return (q.double() @ keys.T * k.shape[1] ** -0.5).softmax(-1) @ values
