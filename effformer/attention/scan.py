"""Causal sums in chunks: exact, linear in tokens, one graph for any length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer.nn.onnx_nodes import MICROSOFT, node_domains

from .gated_onnx import gated_scan_onnx
from .slices import known_length, token_slices

__all__ = ["causal_product", "causal_product_macs", "running_sum", "scan_slices", "takes_scan_node"]

_TEMPORARIES = 2
"""Arrays as large as the queries that a causal form keeps at work at once. Measured: 2^17 elements
of each beat 2^19 by a tenth (flow) to a fifth (sana)."""


def scan_slices(q: Tensor, *, chunk: int) -> list[slice]:
    """Slices of the tokens of q (B, H, N, K), in whole chunks, for a causal form that hands its sums
    from one to the next.
    """
    width = q.shape[0] * q.shape[1] * q.shape[3]
    return token_slices(q.shape[2], _TEMPORARIES * width, device=q.device, least=chunk)


def running_sum(x: Tensor, start: Tensor | None = None) -> Tensor:
    """Inclusive prefix sum over the tokens of x (B, H, N, ...); ``start`` (B, H, ...) is what came
    before.
    """
    total = x.cumsum(dim=2)
    return total if start is None else total + start.unsqueeze(2)


def takes_scan_node() -> bool:
    """The graph that is captured may hold the node of ONNX Runtime for causal sums."""
    domains = node_domains()
    return domains is not None and MICROSOFT in domains


def causal_product(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """``out_i = q_i (start + sum_{j <= i} k_j^T v_j)`` in chunks of tokens.

    Inside a chunk the masked product of scores, between chunks the carried (K, V) matrix: O(N
    chunk) work and O(N / chunk) matrices, never an N x N tensor. The result does not depend on
    ``chunk``. Graphs for ONNX Runtime hold one node instead.

    Args:
        q: (B, H, N, K).
        k: (B, H, N, K).
        v: (B, H, N, V).
        start: (B, H, K, V) sum of the past, None for zero.
        chunk: tokens per chunk.

    Returns:
        out (B, H, N, V) and the sum after the last token (B, H, K, V).
    """
    n, spare = q.shape[2], chunk
    if takes_scan_node():
        return gated_scan_onnx(q, k, v, None, None, start, delta=False, scale=1.0)
    if known_length(q):
        chunk, spare = min(chunk, n), 0
    pad = -n % chunk + spare
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    sums = k.transpose(-2, -1) @ v
    before = sums.cumsum(dim=2) - sums
    if start is not None:
        before = before + start.unsqueeze(2)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    inside = (q @ k.transpose(-2, -1)).masked_fill(~lower, 0.0)
    out = (q @ before + inside @ v).flatten(2, 3)[:, :, :n]
    return out, before[:, :, -1] + sums[:, :, -1]


def causal_product_macs(n: int, chunk: int, *, heads: int, head_dim: int) -> int:
    """Multiply-adds of `causal_product` for one sample: four products on tokens padded to whole
    chunks.
    """
    chunk = min(chunk, n)
    padded = -(-n // chunk) * chunk
    return heads * padded * (2 * head_dim**2 + 2 * chunk * head_dim)
