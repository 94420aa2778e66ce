"""Evaluations of softmax attention; none of them ever drops an argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from effformer.checks import CapabilityError, need, unknown

__all__ = ["attend", "attend_packed", "carries_tangents", "fused"]


def attend(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    bias: Tensor | None = None,
) -> Tensor:
    """``softmax(scale * q k^T + bias + mask) v`` by the named backend.

    Args:
        backend: "sdpa", "xformers" or "reference".
        q: (B, H, N, K).
        k: (B, H, M, K).
        v: (B, H, M, V).
        mask: bool, True = may attend, broadcastable to (B, H, N, M), or None.
        causal: query i attends to keys <= i (needs N = M).
        scale: factor of the scores, None means K^-0.5.
        bias: added to the scores, broadcastable to (B, H, N, M), in the dtype of q.

    Returns:
        (B, H, N, V); rows that may attend to nothing are zero.

    Raises:
        CapabilityError: xformers on a tensor that is not on a CUDA device, or causal with N != M.
        ValueError: unknown backend.
    """
    if causal and q.shape[2] != k.shape[2]:
        raise CapabilityError(
            f"causal attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}"
        )
    if backend == "sdpa":
        return _sdpa(q, k, v, mask, causal, scale, bias)
    if backend == "reference":
        return _reference(q, k, v, mask, causal, scale, bias)
    if backend == "xformers":
        return _xformers(q, k, v, mask, causal, scale, bias)
    raise unknown("backend", backend, ["sdpa", "xformers", "reference"], where="softmax")


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Softmax attention within the sequences of one packed row, by one kernel of xformers.

    Args:
        q: (1, H, T, K).
        k: (1, H, T, K).
        v: (1, H, T, V).
        lengths: tokens of each sequence, T in total.
        causal: tokens attend to earlier ones of their sequence.
        scale: factor of the scores, None means K^-0.5.

    Returns:
        (1, H, T, V).

    Raises:
        CapabilityError: a tensor that is not on a CUDA device.
    """
    _check_cuda(q)
    ops = need("xformers.ops", "xformers")
    biases = need("xformers.ops.fmha.attn_bias", "xformers")
    real = [length for length in lengths if length]
    if not real:
        return v
    bias = biases.BlockDiagonalMask.from_seqlens(real)
    heads_last = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = ops.memory_efficient_attention(
        *heads_last, attn_bias=bias.make_causal() if causal else bias, scale=scale
    )
    return out.transpose(1, 2)


def _check_cuda(q: Tensor) -> None:
    if not q.is_cuda:
        raise CapabilityError(
            f"softmax: backend 'xformers' runs on CUDA devices only, got a tensor on {q.device}; "
            "choices here: sdpa, reference"
        )


def _causal_mask(q: Tensor, mask: Tensor | None) -> Tensor:
    lower = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return lower if mask is None else lower & mask


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    bias: Tensor | None,
) -> Tensor:
    if mask is None and bias is None:
        return fused(q, k, v, is_causal=causal, scale=scale)
    if causal:
        mask = _causal_mask(q, mask)
    if mask is None:
        return fused(q, k, v, attn_mask=bias, scale=scale)
    added = mask if bias is None else bias.masked_fill(~mask, -torch.inf)
    out = fused(q, k, v, attn_mask=added, scale=scale)
    # The fused operators disagree about rows without a key (nan, mean or zero); zero is ours.
    some = mask.any(dim=-1, keepdim=True)
    return out * some if bias is None else torch.where(some, out, 0.0)


def carries_tangents(*inputs: Tensor | None) -> bool:
    """Forward-mode derivatives are taken here: kernels without them make way for their formulas."""
    return not torch.compiler.is_compiling() and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    )


def fused(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """One fused kernel, or its formula where forward-mode derivatives are taken: kernels have none."""
    if not carries_tangents(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **options)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    bias: Tensor | None,
) -> Tensor:
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    if causal:
        mask = _causal_mask(q, mask)
    if mask is None:
        return scores.softmax(dim=-1) @ v
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return (weights * mask) @ v


def _xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    bias: Tensor | None,
) -> Tensor:
    _check_cuda(q)
    ops = need("xformers.ops", "xformers")
    if mask is None and bias is None:
        added = ops.LowerTriangularMask() if causal else None
    else:
        added = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
        allowed = _causal_mask(q, mask) if causal else mask
        if allowed is not None:
            added = torch.where(allowed, added, -torch.inf)
        added = added.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2]).contiguous()
    heads_last = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = ops.memory_efficient_attention(
        *heads_last, attn_bias=added, scale=scale
    ).transpose(1, 2)
    if mask is None:
        return out
    some = (_causal_mask(q, mask) if causal else mask).any(dim=-1, keepdim=True)
    return torch.where(some, out, 0.0)
