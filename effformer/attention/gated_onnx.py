"""The gated linear recurrence as one node of ONNX Runtime: ``com.microsoft::LinearAttention``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["gated_scan_onnx", "linear_scan_onnx"]

Rule = Literal["linear", "gated", "delta", "gated_delta"]


def gated_scan_onnx(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    *,
    delta: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`gated_scan` as a node; only for graphs that are captured for ONNX Runtime, eager execution
    of the node returns zeros. Arguments as there.
    """
    heads, n = v.shape[1], v.shape[2]
    k = _grouped(k, heads)
    if decay is not None:
        if decay.dim() == 1:
            decay = decay[None, :, None].expand(v.shape[0], -1, n)
        decay = decay.to(torch.float32)
        decay = decay.transpose(1, 2) if decay.dim() == 3 else _joined(decay)
    if not delta and beta is not None:  # the gated rules have no place for it
        v, beta = v * beta.unsqueeze(-1), None
    if delta and beta is None:
        beta = v.new_ones(v.shape[0], heads, n)
    beta = None if beta is None else beta.to(torch.float32).transpose(1, 2)
    rules: dict[tuple[bool, bool], Rule] = {
        (False, False): "linear", (False, True): "gated",
        (True, False): "delta", (True, True): "gated_delta",
    }  # fmt: skip
    rule = rules[delta, decay is not None]
    out, last = _node(q, k, v, state, decay, beta, rule=rule, scale=scale)
    return out.to(v.dtype), last


def linear_scan_onnx(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal sums of linear attention as a node: ``sum_{j <= i} (q_i . k_j) v_j`` and
    ``sum_{j <= i} q_i . k_j``, which divides it where the attention is normalised.

    A column of ones beside the values gives the second sum. A numerator with rotated features takes
    a second node: call once with rotated q and k and once with plain ones.

    Args:
        q: features of the queries, (B, H, N, K).
        k: features of the keys, (B, H, N, K).
        v: (B, H, N, V).
        state: sums of the past, (B, H, K, V + 1), None for 0.

    Returns:
        The sums (B, H, N, V) and (B, H, N, 1), and the new state (B, H, K, V + 1).
    """
    out, last = _node(
        q, k, F.pad(v, (0, 1), value=1.0), state, None, None, rule="linear", scale=1.0
    )
    return out[..., :-1].to(v.dtype), out[..., -1:].to(v.dtype), last


def _node(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    decay: Tensor | None,
    beta: Tensor | None,
    *,
    rule: Rule,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The node; q and the value heads of k and v are heads-first here, decay and beta are not."""
    (batch, heads, n, values), width = v.shape, k.shape[-1]
    q, k, v = (_joined(x.to(torch.float32)) for x in (q, k, v))
    state = None if state is None else state.to(torch.float32)
    out, last = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        (q, k, v, state, decay, beta),
        {
            "q_num_heads": q.shape[-1] // width, "kv_num_heads": heads, "update_rule": rule,
            "scale": scale,
        },
        dtypes=(torch.float32, torch.float32),
        shapes=((batch, n, heads * values), (batch, heads, width, values)),
        version=1,
    )  # fmt: skip
    return out.unflatten(-1, (heads, values)).transpose(1, 2), last


def _joined(x: Tensor) -> Tensor:
    """(B, H, N, K) -> (B, N, H K)."""
    return x.transpose(1, 2).flatten(2)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """Repeat the heads of x (B, H, N, K) for their value heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
