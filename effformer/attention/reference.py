"""The slow obvious forms, token by token in float64; every fast path is tested against them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from effformer.nn.legendre import legendre_system
from effformer.places import Rope

from .flow import Flow
from .lmu import LMU

__all__ = [
    "axes_reference", "flow_reference", "linear_reference", "lmu_reference", "rotations",
    "softmax_reference", "turned",
]  # fmt: skip


def rotations(rope: Rope) -> Tensor:
    """Rotary tables (N, K) as one matrix per token, (N, K, K): turns of the planes of its pairs."""
    n, width = rope.cos.shape
    matrices = torch.zeros(n, width, width, dtype=rope.cos.dtype)
    for i, pair in product(range(n), range(width // 2)):
        a, b = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + width // 2)
        c, s = rope.cos[i, a], rope.sin[i, a]
        matrices[i, a, a], matrices[i, a, b] = c, -s
        matrices[i, b, a], matrices[i, b, b] = s, c
    return matrices


def turned(x: Tensor, turns: Tensor | None) -> Tensor:
    """Row i of x (N, K) times matrix i of turns (N, K, K)."""
    if turns is None:
        return x
    return torch.stack([turn @ row for turn, row in zip(turns, x, strict=True)])


def softmax_reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Softmax attention, one query at a time; q (N, K), k (M, K), v (M, V)."""
    rows = []
    for i in range(q.shape[0]):
        last = i + 1 if causal else k.shape[0]
        scores = torch.stack([(q[i] * k[j]).sum() for j in range(last)]) / q.shape[1] ** 0.5
        weights = scores.exp() / scores.exp().sum()
        rows.append(sum(weights[j] * v[j] for j in range(last)))
    return torch.stack(rows)


def linear_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    eps: float = 1e-6,
    phi: Callable[[Tensor], Tensor] = lambda x: torch.nn.functional.elu(x) + 1,
    turns: Tensor | None = None,
) -> Tensor:
    """Linear attention, one pair at a time; q (N, K), k (M, K), v (M, V); turns (N, K, K) of the
    features above the fraction bar.
    """
    q, k = phi(q), phi(k)
    far_q, far_k = turned(q, turns), turned(k, turns)
    rows = []
    for i in range(q.shape[0]):
        last = i + 1 if causal else k.shape[0]
        total = torch.stack([(q[i] * k[j]).sum() for j in range(last)]).sum() + eps
        rows.append(sum((far_q[i] * far_k[j]).sum() * v[j] for j in range(last)) / total)
    return torch.stack(rows)


def axes_reference(
    mix: Callable[[Tensor], Tensor], x: Tensor, grid: tuple[int, ...], over: str, front: int = 0
) -> Tensor:
    """A mixer along some axes, line by line; x (front + cells, D), mix (n, D) to (n, D)."""
    letters = "thw"[-len(grid) :]
    lines: dict[tuple[int, ...], list[int]] = {}
    for i, cell in enumerate(product(*map(range, grid))):
        fixed = tuple(p for p, letter in zip(cell, letters, strict=True) if letter not in over)
        lines.setdefault(fixed, []).append(front + i)
    rows = [torch.zeros_like(row) for row in x]
    for members in lines.values():
        mixed = mix(x[[*range(front), *members]])
        for i in range(front):
            rows[i] = rows[i] + mixed[i] / len(lines)
        for place, row in zip(members, mixed[front:], strict=True):
            rows[place] = row
    return torch.stack(rows)


def flow_reference(
    q: Tensor, k: Tensor, v: Tensor, config: Flow.Config, turns: Tensor | None = None
) -> Tensor:
    """Flow-Attention from its definition; q (N, K), k (M, K), v (M, V); turns (N, K, K) of the
    features that carry values.
    """
    q, k = _phi(q, config), _phi(k, config)
    far = turned(q, turns), turned(k, turns)
    return _flow_causal(q, k, v, config, *far) if config.causal else _flow(q, k, v, config, *far)


def _phi(x: Tensor, config: Flow.Config) -> Tensor:
    return torch.sigmoid(x) if config.kernel == "sigmoid" else torch.relu(x) + 1e-6


def _bound(x: Tensor, config: Flow.Config) -> Tensor:
    return x if config.clamp is None else x.clamp(-config.clamp, config.clamp)


def _flow(
    q: Tensor, k: Tensor, v: Tensor, config: Flow.Config, far_q: Tensor, far_k: Tensor
) -> Tensor:
    e, extra, (n, m) = config.eps, config.flow_eps, (q.shape[0], k.shape[0])
    i = torch.stack([1 / (((q[a] + e) * (k.sum(0) + e)).sum() + extra) for a in range(n)])
    o = torch.stack([1 / (((k[b] + e) * (q.sum(0) + e)).sum() + extra) for b in range(m)])
    ko, qi = (k * o[:, None]).sum(0), (q * i[:, None]).sum(0)
    i2 = torch.stack([((q[a] + e) * (ko + e)).sum() + extra for a in range(n)])
    o2 = _bound(torch.stack([((k[b] + e) * (qi + e)).sum() + extra for b in range(m)]), config)
    c = m * o2.exp() / o2.exp().sum()
    a = torch.sigmoid(i2 * n / m)
    values = sum(torch.outer(far_k[b], v[b] * c[b]) for b in range(m))
    return torch.stack([a[s] * (far_q[s] * i[s]) @ values for s in range(n)])


def _flow_causal(
    q: Tensor, k: Tensor, v: Tensor, config: Flow.Config, far_q: Tensor, far_k: Tensor
) -> Tensor:
    e, extra = config.eps, config.flow_eps
    rows: list[Tensor] = []
    ko, qi, total = torch.zeros_like(k[0]), torch.zeros_like(q[0]), torch.zeros_like(q[0, 0])
    values = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype)
    for t in range(q.shape[0]):
        n = t + 1
        i = n / (((q[t] + e) * (k[:n].sum(0) + e)).sum() + extra)
        o = n / (((k[t] + e) * (q[:n].sum(0) + e)).sum() + extra)
        ko, qi = ko + k[t] * o, qi + q[t] * i
        i2 = ((q[t] + e) * (ko + e)).sum() / n + extra
        weight = _bound(((k[t] + e) * (qi + e)).sum() / n + extra, config).exp()
        total = total + weight
        values = values + torch.outer(far_k[t], v[t] * n * weight / total)
        rows.append(torch.sigmoid(i2) * (far_q[t] * i / n) @ values)
    return torch.stack(rows)


def lmu_reference(x: Tensor, part: LMU) -> Tensor:
    """A Legendre memory unit, one token at a time; x (N, D)."""
    transition, write = legendre_system(part.memory.order, part.memory.theta)
    m, rows = torch.zeros_like(write), []
    for token in x:
        u = (part.write.weight[0] * token).sum() + part.write.bias[0]
        m = transition @ m + write * u.clamp(min=0)
        h = part.read.weight @ torch.cat([m, token]) + part.read.bias
        rows.append(part.proj(h.clamp(min=0)))
    return torch.stack(rows)
