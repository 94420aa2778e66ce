"""The slow obvious forms of the efficient attentions, one head of one sample in float64.

q (N, K), k (M, K), v (M, V) unless stated otherwise; every fast path is tested against them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nystrom_reference", "topk_reference"]


def topk_reference(q: Tensor, k: Tensor, v: Tensor, *, keep: int, causal: bool = False) -> Tensor:
    """Selective hard attention: sort the scores of a row, keep the first ``keep``."""
    rows = []
    for i in range(q.shape[0]):
        last = i + 1 if causal else k.shape[0]
        scores = {j: (q[i] * k[j]).sum() / q.shape[1] ** 0.5 for j in range(last)}
        best = sorted(scores, key=lambda j: -scores[j].item())[:keep]
        total = sum(scores[j].exp() for j in best)
        rows.append(sum(scores[j].exp() / total * v[j] for j in best))
    return torch.stack(rows)


def nystrom_reference(
    q: Tensor, k: Tensor, v: Tensor, *, landmarks: int, iterations: int, taps: Tensor | None = None
) -> Tensor:
    """Nystrom attention; taps (T,) is the filter of this head on the values."""
    n, width = q.shape
    if n <= landmarks:
        out = _weights(q, k, width**-0.5) @ v
    else:
        groups = [[i for i in range(n) if i * landmarks // n == g] for g in range(landmarks)]
        lq = torch.stack([q[g].mean(0) for g in groups])
        lk = torch.stack([k[g].mean(0) for g in groups])
        a, eye = _weights(lq, lk, width**-0.5), torch.eye(landmarks, dtype=q.dtype)
        z = a.T / (a.sum(0).max() * a.sum(1).max())
        for _ in range(iterations):
            z = z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z))) / 4
        out = _weights(q, lk, width**-0.5) @ z @ _weights(lq, k, width**-0.5) @ v
    if taps is None:
        return out
    half = len(taps) // 2
    padded = torch.nn.functional.pad(v, (0, 0, half, half))
    return out + torch.stack([taps @ padded[i : i + len(taps)] for i in range(n)])


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = torch.stack([torch.stack([(a * b).sum() * scale for b in k]) for a in q])
    return scores.exp() / scores.exp().sum(dim=1, keepdim=True)
