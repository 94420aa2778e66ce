"""Closed formulas: what parts, models and samplers cost in multiply-adds.

Convention: one multiply-add is one MAC and FLOPs are 2 x MACs; elementwise work, norms, softmax,
embeddings and weighted sums are 0; batch 1. N tokens, M keys, D width, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal

__all__ = [
    "ATTENTION",
    "CONVENTION",
    "dit_params",
    "dit_parts",
    "dynamic_block",
    "factorized_attention",
    "flow_attention",
    "linear_attention",
    "packed_attention",
    "sampler_macs",
    "softmax_attention",
    "windowed_attention",
]

CONVENTION = (
    "one multiply-add = 1 MAC, FLOPs = 2 x MACs; matrix products, convolutions and attention "
    "products count, a Fourier transform of length L is 5/2 L log2 L (half of it if one side is real), "
    "elementwise work, norms, softmax and embeddings are 0; masks and causality do not reduce the count"
)


def softmax_attention(n: int, dim: int, heads: int = 1, m: int | None = None) -> int:
    """Products of softmax attention, fused or not: ``q k^T`` and weights times v, 2 N M D."""
    return 2 * n * (n if m is None else m) * dim


def linear_attention(n: int, dim: int, heads: int, m: int | None = None) -> int:
    """Kernel attention: ``k^T v``, ``q (k^T v)``, one normaliser dot product: (N + M) D d + N D."""
    m = n if m is None else m
    return (n + m) * dim * (dim // heads) + n * dim


def flow_attention(n: int, dim: int, heads: int, m: int | None = None) -> int:
    """Flow-Attention, not causal: the two products and four dot products, (N + M) D (d + 2)."""
    m = n if m is None else m
    return (n + m) * dim * (dim // heads + 2)


def packed_attention(lengths: Sequence[int], dim: int) -> int:
    """Softmax attention on sequences that do not see each other: the sum of 2 n^2 D."""
    return sum(2 * n * n * dim for n in lengths)


def windowed_attention(n: int, dim: int, window: int, global_tokens: int = 0) -> int:
    """Every token attends to ``window`` tokens, and global ones to and from everything."""
    return 2 * n * min(window, n) * dim + 4 * n * global_tokens * dim


def factorized_attention(grid: Sequence[int], dim: int) -> int:
    """Softmax attention along each axis of a grid in turn: 2 N D sum(axes)."""
    return 2 * prod(grid) * sum(grid) * dim


ATTENTION: dict[str, Callable[[int, int, int], int]] = {
    "softmax": softmax_attention,
    "linear": linear_attention,
    "flow": flow_attention,
}
"""Attention core -> ``macs(n, dim, heads)`` of self-attention between its projections."""


def dit_parts(
    *,
    tokens: int,
    dim: int,
    depth: int,
    heads: int,
    patch: int,
    attention: Literal["softmax", "linear", "flow"] = "softmax",
    channels: int = 4,
    out_channels: int = 8,
    mlp_ratio: float = 4.0,
    time_features: int = 256,
) -> dict[str, int]:
    """Multiply-adds of a DiT by part; the sum is the cost of one forward of batch 1.

    Args:
        tokens: N.
        dim: D.
        depth: number of blocks.
        heads: H.
        patch: patch side.
        attention: core of every block.
        channels: input channels.
        out_channels: output channels.
        mlp_ratio: inner width of the FFN over D.
        time_features: sinusoidal features of the time.

    Returns:
        patch_embed, t_mlp, adaln_blocks, adaln_final, qkv, proj, attn, mlp, final_linear.

    Example:
        >>> sum(dit_parts(tokens=256, dim=768, depth=12, heads=12, patch=2).values())
        23005102080
    """
    n, d = tokens, dim
    return {
        "patch_embed": n * patch**2 * channels * d,
        "t_mlp": time_features * d + d * d,
        "adaln_blocks": 6 * depth * d * d,
        "adaln_final": 2 * d * d,
        "qkv": 3 * depth * n * d * d,
        "proj": depth * n * d * d,
        "attn": depth * ATTENTION[attention](n, d, heads),
        "mlp": 2 * depth * n * d * int(d * mlp_ratio),
        "final_linear": n * d * patch**2 * out_channels,
    }


def dit_params(
    *,
    tokens: int,
    dim: int,
    depth: int,
    patch: int,
    channels: int = 4,
    out_channels: int = 8,
    mlp_ratio: float = 4.0,
    time_features: int = 256,
    classes: int = 1000,
) -> int:
    """Parameters of a DiT with positional table and null class; arguments as in `dit_parts`."""
    d, hidden, area = dim, int(dim * mlp_ratio), patch**2
    block = 3 * d * d + 3 * d + d * d + d + 2 * d * hidden + hidden + d + 6 * d * d + 6 * d
    ends = area * channels * d + d + 2 * d * d + 2 * d + (d + 1) * area * out_channels
    conditioning = time_features * d + d + d * d + d + (classes + 1) * d
    return depth * block + ends + conditioning + tokens * d


def dynamic_block(
    *,
    tokens: int,
    dim: int,
    heads: int,
    heads_on: float,
    groups_on: float,
    tokens_on: float,
    token_router: bool = True,
) -> float:
    """Executed multiply-adds of one block with gated heads, FFN groups and FFN tokens.

    ``(4 N D^2 + 2 N^2 D) heads_on / H + 8 N D^2 (groups_on / H) (tokens_on / N)`` plus the routers:
    ``2 (H - 1) D`` per sample for heads and groups, ``N (D^2 / 16 + D / 16)`` for tokens.

    Args:
        tokens: N.
        dim: D.
        heads: H, which is also the number of FFN groups.
        heads_on: executed heads (a mean over samples may be fractional).
        groups_on: executed FFN groups.
        tokens_on: tokens that pass through the FFN.
        token_router: the block has a router for tokens.

    Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456.
    """
    n, d = tokens, dim
    attention = (4 * n * d * d + 2 * n * n * d) * heads_on / heads
    mlp = 8 * n * d * d * (groups_on / heads) * (tokens_on / n)
    routers = 2 * (heads - 1) * d + (n * (d * d / 16 + d / 16) if token_router else 0)
    return attention + mlp + routers


def sampler_macs(
    forward: int, steps: int, *, calls_per_step: int = 1, guidance: bool = False, decode: int = 0
) -> int:
    """Multiply-adds of making one sample.

    Args:
        forward: cost of one network call with batch 1.
        steps: sampler steps.
        calls_per_step: network calls per step: Euler 1, midpoint and Heun 2, RK4 4.
        guidance: classifier-free guidance, which calls the network twice.
        decode: cost of turning the last state into the sample.

    Raises:
        ValueError: steps or calls_per_step below 1.

    Example:
        >>> sampler_macs(10, steps=250, guidance=True)
        5000
    """
    if steps < 1 or calls_per_step < 1:
        raise ValueError(
            "sampler_macs: steps and calls_per_step must be at least 1, "
            f"got {steps} and {calls_per_step}"
        )
    return forward * steps * calls_per_step * (2 if guidance else 1) + decode
