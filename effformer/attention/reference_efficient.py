"""The slow obvious forms of the efficient attentions, one head of one sample in float64.

q (N, K), k (M, K), v (M, V) unless stated otherwise; every fast path is tested against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .performer import Performer
from .reference import turned
from .tdsm import Shuffle

__all__ = [
    "efficient_reference", "linformer_reference", "longformer_reference",
    "nystrom_reference", "performer_reference",
    "reformer_reference", "tdsm_reference", "topk_reference",
]  # fmt: skip


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


def performer_reference(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, config: Performer.Config
) -> Tensor:
    """FAVOR+ attention, one query at a time; the causal form sees a prefix, nothing else."""
    outputs = []
    for i in range(q.shape[0]):
        last = i + 1 if config.causal else k.shape[0]
        phi_q, phi_k = _random_features(q[i : i + 1], rows, config)[0], k[:last]
        phi_k = _random_features(phi_k, rows, config)
        weights = torch.stack([(phi_q * phi).sum() for phi in phi_k])
        total = weights.sum() + (config.causal_eps * phi_q.sum() if config.causal else 0)
        outputs.append(sum(weights[j] * v[j] for j in range(last)) / total)
    return torch.stack(outputs)


def _random_features(x: Tensor, rows: Tensor, config: Performer.Config) -> Tensor:
    x = x / x.shape[1] ** 0.25
    h = torch.stack([torch.stack([(w * one).sum() for w in rows]) for one in x])
    if config.kernel == "relu":
        return h.relu() + (1e-3 if config.eps is None else config.eps)
    top, h = h.max().detach(), h - (x * x).sum(dim=1, keepdim=True) / 2
    eps = 1e-4 if config.eps is None else config.eps
    return ((h - top).exp() + eps) / rows.shape[0] ** 0.5


def efficient_reference(q: Tensor, k: Tensor, v: Tensor, turns: Tensor | None = None) -> Tensor:
    """Efficient attention, one channel of the keys at a time; turns (N, K, K) of both softmaxes."""
    maps = torch.stack([k[:, c].exp() / k[:, c].exp().sum() for c in range(k.shape[1])], dim=1)
    maps = turned(maps, turns)
    summaries = torch.stack([(one[:, None] * v).sum(0) for one in maps.unbind(1)])
    rows = turned(torch.stack([row.exp() / row.exp().sum() for row in q]), turns)
    return torch.stack([row @ summaries for row in rows])


def linformer_reference(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Linformer; the projections (tokens, L) act row by row."""
    k = torch.stack([(keys[: len(k), [c]] * k).sum(0) for c in range(keys.shape[1])])
    v = torch.stack([(values[: len(v), [c]] * v).sum(0) for c in range(values.shape[1])])
    return _weights(q, k, q.shape[1] ** -0.5) @ v


def longformer_reference(
    local: tuple[Tensor, Tensor, Tensor],
    far: tuple[Tensor, Tensor, Tensor],
    marks: Tensor,
    *,
    half: int,
    causal: bool = False,
) -> Tensor:
    """Longformer of one head: q, k, v (N, K) of both projections, marks (N,) of global tokens."""
    n, rows = len(marks), []
    for i in range(n):
        q, k, v = (x for x in (far if marks[i] else local))
        seen = [
            j for j in range(i + 1 if causal else n) if marks[i] or marks[j] or abs(i - j) <= half
        ]
        scores = torch.stack([(q[i] * k[j]).sum() / q.shape[1] ** 0.5 for j in seen])
        rows.append(scores.softmax(0) @ v[seen])
    return torch.stack(rows)


def reformer_reference(
    q: Tensor,
    v: Tensor,
    rotations: Tensor,
    *,
    chunk: int,
    causal: bool = False,
    turns: Tensor | None = None,
) -> Tensor:
    """LSH attention of one head: shared q (N, K), v (N, V), rotations (K, rounds, buckets / 2);
    turns (N, K, K) of what is scored.
    """
    n, outputs, normalisers = len(q), [], []
    keys = torch.stack([x / (x.square().mean() + 1e-6).sqrt() / len(x) ** 0.5 for x in q])
    hashed, q, keys = q.detach(), turned(q, turns), turned(keys, turns)
    for r in range(rotations.shape[1]):
        rotated = hashed @ rotations[:, r]
        bucket = torch.cat([rotated, -rotated], dim=1).argmax(dim=1).tolist()
        order = sorted(range(n), key=lambda i: (bucket[i], i))
        slot = {i: order.index(i) for i in range(n)}
        for i in range(n):
            if causal:
                near = [j for j in range(i + 1) if bucket[j] == bucket[i]]
                seen = [j for j in near if slot[i] - slot[j] <= chunk]
            else:
                seen = [j for j in range(n) if 0 <= slot[i] // chunk - slot[j] // chunk <= 1]
            scores = torch.stack([q[i] @ keys[j] if j != i else q.new_tensor(-1e5) for j in seen])
            outputs.append(scores.softmax(0) @ v[seen])
            normalisers.append(scores.logsumexp(0))
    rounds = torch.stack(normalisers).view(-1, n).softmax(dim=0)
    return (rounds[..., None] * torch.stack(outputs).view(-1, n, v.shape[1])).sum(dim=0)


def tdsm_reference(
    x: Tensor,
    shuffle: Shuffle,
    widths: Sequence[int],
    segments: int,
    attend: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Two-dimensional shuffle mixer of x (N, D); ``attend(i, tokens)`` is the attention of group i
    on the tokens (N / segments, d) of one segment.
    """
    n, out, start = x.shape[0], torch.zeros_like(x), 0
    for i, width in enumerate(widths):
        channels = shuffle.channels[start : start + width].tolist()
        group = [x[token, channel] for token in range(n) for channel in channels]
        elements = shuffle.elements[i].tolist()
        shuffled = [group[element] for element in elements]
        length = n * width // segments
        mixed: list[Tensor] = []
        for s in range(segments):
            piece = torch.stack(shuffled[s * length : (s + 1) * length])
            mixed += attend(i, piece.reshape(n // segments, width)).flatten()
        for place, element in enumerate(elements):
            out[element // width, channels[element % width]] = mixed[place]
        start += width
    return out
