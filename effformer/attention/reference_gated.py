"""The gated linear recurrence, one token and one head at a time in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gated_reference"]


def gated_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    *,
    delta: bool,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``S' = diag(exp g) S;  u = b (v - [delta] S'^T k);  S = S' + k u^T;  o = s S^T q``.

    Args:
        q: (B, H, N, K).
        k: (B, H, N, K).
        v: (B, Hv, N, V).
        decay: g, (Hv,), (B, Hv, N), (B, Hv, N, K) or None for 0.
        beta: b, (B, Hv, N) or None for 1.
        state: (B, Hv, K, V) or None for 0.
        delta: subtract what the state holds under the key.
        scale: s, None for K^-1/2.

    Returns:
        out (B, Hv, N, V) and the state after the last token (B, Hv, K, V).
    """
    q, k, v = q.double(), k.double(), v.double()
    (batch, heads, n, width), values = q.shape, v.shape[1]
    scale = width**-0.5 if scale is None else scale
    outs, states = [], []
    for b in range(batch):
        for j in range(values):
            h = j * heads // values
            s = torch.zeros(width, v.shape[3]).to(v) if state is None else state[b, j].double()
            rows = []
            for t in range(n):
                if decay is not None:
                    g = decay[j] if decay.dim() == 1 else decay[b, j, t]
                    s = g.double().exp().reshape(-1, 1) * s
                u = v[b, j, t] - s.T @ k[b, h, t] if delta else v[b, j, t]
                if beta is not None:
                    u = beta[b, j, t].double() * u
                s = s + torch.outer(k[b, h, t], u)
                rows.append(scale * s.T @ q[b, h, t])
            outs.append(torch.stack(rows) if rows else v[b, j])
            states.append(s)
    return (
        torch.stack(outs).unflatten(0, (batch, values)),
        torch.stack(states).unflatten(0, (batch, values)),
    )
