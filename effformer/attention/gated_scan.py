"""Gated linear attention: retention, GLA, the delta rules and Mamba-2 as one recurrence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effformer.checks import CapabilityError, check_shape
from effformer.nn.onnx_nodes import MICROSOFT, node_domains
from effformer.nn.precision import exactly

from .gated_chunks import chunk_states, decayed_scores, decays, unit_lower_inverse
from .gated_onnx import gated_scan_onnx
from .slices import Rows, capturing, chunk_count, known_length, padded, token_slices

__all__ = ["gated_scan", "gated_scan_macs", "retention_decay"]

_FEW = 4
"""Up to so many tokens the recurrence itself is faster than one chunk. Measured."""

_TEMPORARIES = 2
"""As `effformer.attention.scan`: arrays as large as the queries at work at once."""


def gated_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    *,
    delta: bool,
    scale: float | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """``S' = diag(exp g) S;  u = b (v - [delta] S'^T k);  S <- S' + k u^T;  o = s S^T q``, in chunks.

    Inside a chunk of C tokens, with G the sum of g since the state S before the chunk,
    ``A_ij = s sum_d q_id k_jd exp(G_id - G_jd)`` for j <= i and, for the delta rule,
    ``M_ij = b_i sum_d k_id k_jd exp(G_id - G_jd)`` for j < i:

        (I + M) U = b (v - (k exp G) S)      (no delta: U = b v)
        O = s (q exp G) S + A U
        S <- diag(exp G_C) S + (k exp(G_C - G))^T U

    Work and memory are linear in N. Everything is computed in float32 at least; the result does not
    depend on ``chunk``, and pieces chained by their states equal the whole.

    Args:
        q: (B, H, N, K).
        k: (B, H, N, K); the delta rule wants unit length (a contraction).
        v: (B, Hv, N, V), Hv a multiple of H; value head j reads q and k of head floor(j H / Hv).
        decay: g <= 0, the log of the decay: (Hv,) the same for all tokens, (B, Hv, N), or
            (B, Hv, N, K) per key channel; -inf forgets everything; None is 0.
        beta: b, (B, Hv, N), None for 1.
        state: (B, Hv, K, V) before the first token, None for 0.
        delta: subtract what the decayed state holds under the key.
        scale: s, None for K^-1/2.
        chunk: tokens per chunk, rounded up to a power of 2; changes speed, not results.

    Returns:
        out (B, Hv, N, V) in the dtype of v and the state after the last token (B, Hv, K, V) in
        float32 at least.

    Raises:
        ValueError: shapes that do not fit.

    Differs from the papers: per-channel decays are split at the seams of halves, not of blocks of
    16, so that no bound on the decay is needed.

    Reference: Gated Delta Networks: Improving Mamba2 with Delta Rule, 2024, arXiv 2412.06464; Gated
    Linear Attention Transformers with Hardware-Efficient Training, 2023, arXiv 2312.06635; Kimi
    Linear: An Expressive, Efficient Attention Architecture, 2025, arXiv 2510.26692.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 2, 100, 8).unbind(0)
        >>> k = torch.nn.functional.normalize(k, dim=-1)
        >>> out, state = gated_scan(q, k, v, -torch.rand(1, 2, 100), delta=True)
        >>> out.shape, state.shape
        (torch.Size([1, 2, 100, 8]), torch.Size([1, 2, 8, 8]))
    """
    _check(q, k, v, decay, beta, state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    few = known_length(q) and q.shape[2] <= _FEW
    domains = node_domains()
    if domains is not None and MICROSOFT in domains:
        return gated_scan_onnx(q, k, v, decay, beta, state, delta=delta, scale=scale)
    if domains is not None and not few:
        raise CapabilityError(
            "gated_scan: 'LinearAttention' is an operator of com.microsoft, which the target of "
            "this graph does not have; choices: target 'onnx-cpu', or a graph of one token"
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    with exactly(q):
        g, b = (None if x is None else x.to(dtype) for x in (decay, beta))
        if state is None:
            state = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1], dtype=dtype)
        state = state.to(dtype)
        if g is not None and g.dim() == 1:
            g = g[None, :, None].expand(1, -1, q.shape[2])
        if few:
            return _token_by_token(q, k, v, g, b, state, delta=delta, scale=scale)
        return _in_slices(q, k, v, g, b, state, delta=delta, scale=scale, chunk=chunk)


def _in_slices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    *,
    delta: bool,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Slices of tokens that stay in cache, each in whole chunks."""
    n = q.shape[2]
    chunk = 1 << ((min(chunk, n) if known_length(q) else chunk) - 1).bit_length()
    width = v.shape[0] * v.shape[1] * max(k.shape[-1], v.shape[-1])
    slices, outputs = token_slices(n, _TEMPORARIES * width, device=q.device, least=chunk), Rows(n)
    lengths = [rows.stop - rows.start for rows in slices] if len(slices) > 1 else None
    for parts in zip(*(_cut(x, lengths) for x in (q, k, v, g, b)), strict=True):
        q_, k_, v_, g_, b_ = (None if x is None else x.to(state.dtype) for x in parts)
        assert q_ is not None
        assert k_ is not None
        assert v_ is not None
        out, state = _chunked(q_, k_, v_, g_, b_, state, delta=delta, scale=scale, chunk=chunk)
        outputs.append(out.to(v.dtype))
    return outputs.joined(), state


def _cut(x: Tensor | None, lengths: list[int] | None) -> Sequence[Tensor | None]:
    """Pieces of the tokens (dimension 2)."""
    if lengths is None:
        return [x]
    return [None] * len(lengths) if x is None else x.split(lengths, dim=2)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    *,
    delta: bool,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """One slice, all of its chunks at once; arguments as `gated_scan`, of one dtype.

    Chunks, samples and heads lie in one dimension Z in this order, so that the states before the
    chunks are a view of all states.
    """
    (batch, heads, n, _), start, count = v.shape, state.flatten(0, 1), chunk_count(v, chunk)
    g = q.new_zeros(1, 1, n).expand(batch, heads, n) if g is None else g
    q, k, v = (_chunks(_grouped(x, heads), chunk) for x in (q, k, v))
    written = k
    if b is not None:
        b = _chunks(b.unsqueeze(-1), chunk)
        v, written = v * b, (k * b if delta else k)
    if g.dim() == 4:
        rows = torch.stack([q, written], dim=2) if delta else q.unsqueeze(2)
        decay, scores = decayed_scores(rows, k, _chunks(g, chunk))
        inside, m = scores[:, :, 0], scores[:, :, -1]
    else:
        g = g.expand(batch, -1, -1).unsqueeze(-1)
        decay, weights = decays(_chunks(g, chunk).squeeze(-1))
        inside = (q @ k.mT) * weights
        m = (written @ k.mT) * weights if delta else inside
    after, u, read = (k * decay.after).mT, v, None
    if delta:
        inverse = unit_lower_inverse(m)
        u, read = inverse @ v, inverse @ (written * -decay.before)
    states, u = chunk_states(after, read, decay.whole.unsqueeze(-1), u, start)
    before = states.narrow(0, 0, u.shape[0])
    out = torch.baddbmm((q * decay.before) @ before, inside, u, beta=scale, alpha=scale)
    out = out.unflatten(0, (count, batch, heads)).movedim(0, 2).flatten(2, 3)[:, :, :n]
    return out, states.narrow(0, u.shape[0], start.shape[0]).unflatten(0, (batch, heads))


def _token_by_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    *,
    delta: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, for a few tokens."""
    outputs, heads = [], v.shape[1]
    q, k = (_grouped(x.to(state.dtype), heads) for x in (q * scale, k))
    if g is not None and g.dim() == 3:
        g = g.unsqueeze(-1)
    for t in range(q.shape[2]):
        if g is not None:
            state = state * g[:, :, t].exp().unsqueeze(-1)
        u, key = v[:, :, t : t + 1].to(state.dtype), k[:, :, t : t + 1]
        if delta:
            u = u - key @ state
        if b is not None:
            u = u * b[:, :, t : t + 1, None]
        state = state + key.mT @ u
        outputs.append(q[:, :, t : t + 1] @ state)
    return (torch.cat(outputs, dim=2).to(v.dtype) if outputs else v), state


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, H, N, K) -> (c B H, C, K), the last chunks filled with zeros: nothing is written there and
    nothing decays.
    """
    n, count = x.shape[2], chunk_count(x, chunk)
    if capturing() or count * chunk != n:
        x = padded(x, count * chunk - n)
    return x.unflatten(2, (count, chunk)).movedim(2, 0).flatten(0, 2)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """Repeat the heads of x (B, H, N, K) for their value heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _check(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor | None
) -> None:
    where = "gated_scan"
    check_shape(q, "q (B, H, N, K)", (None,) * 4, where=where)
    check_shape(k, "k (B, H, N, K), as q", tuple(q.shape), where=where)
    batch, heads, n, width = q.shape
    check_shape(v, "v (B, Hv, N, V)", (batch, None, n, None), where=where)
    values = v.shape[1]
    if values % heads:
        raise ValueError(f"{where}: {values} value heads are no multiple of {heads} heads")
    if decay is not None:
        sizes = {1: (values,), 4: (batch, values, n, width)}.get(decay.dim(), (batch, values, n))
        check_shape(decay, "decay (Hv,), (B, Hv, N) or (B, Hv, N, K)", sizes, where=where)
    if beta is not None:
        check_shape(beta, "beta (B, Hv, N)", (batch, values, n), where=where)
    if state is not None:
        sizes = (batch, values, width, v.shape[3])
        check_shape(state, "state (B, Hv, K, V)", sizes, where=where)


def retention_decay(heads: int) -> Tensor:
    """Constant log decays ``log(1 - 2^(-5 - h))`` of the heads h of retention, (H,) float64.

    Reference: Retentive Network: A Successor to Transformer for Large Language Models, 2023, arXiv
    2307.08621.
    """
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, dtype=torch.float64))))


def gated_scan_macs(
    n: int,
    chunk: int = 64,
    *,
    heads: int,
    key_dim: int,
    value_dim: int,
    delta: bool,
    per_channel: bool = False,
) -> int:
    """Multiply-adds of `gated_scan` for one sample of n tokens, which are padded to whole chunks.

    Args:
        n: tokens.
        chunk: tokens per chunk.
        heads: value heads.
        key_dim: K.
        value_dim: V.
        delta: with the delta rule.
        per_channel: one decay per key channel.
    """
    pair = key_dim * value_dim
    if n <= _FEW:
        return heads * n * pair * (3 if delta else 2)
    size = 1 << (min(chunk, n) - 1).bit_length()
    scores = size * (size - 1) // 2 if per_channel else size**2
    once = scores * key_dim + size**2 * value_dim + 2 * size * pair
    if delta:
        once += scores * key_dim + size**2 * (key_dim + value_dim) + size**3 // 2 + size * pair
    return heads * -(-n // size) * once
