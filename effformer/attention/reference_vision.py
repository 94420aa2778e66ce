"""The slow obvious forms of the linear attentions of images: one image, every pair of tokens.

Tokens (N, D) stand row-major on a grid of h x w cells. Weights come as a mapping under the names of
the mixer's state, so that a reference shares nothing with the fast form but them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = [
    "agent_reference", "conv_reference", "focused_reference", "interpolate_reference",
    "lin_reference", "mlla_reference", "pair_weights", "polaformer_reference", "rala_reference",
]  # fmt: skip

Weights = Mapping[str, Tensor]
Grid = tuple[int, int]


def pair_weights(
    q: Tensor, k: Tensor, *, eps: float, turns: Sequence[Tensor] | None = None
) -> Tensor:
    """The N x n weights of normalised linear attention, q (N, K) and k (n, K) features.

    ``w_ij = (R_i q_i) . (R_j k_j) / n / (q_i . mean_j k_j + eps)``; turns (N, K/2) are the angles
    of the pairs (0, 1), (2, 3), ... of every token.
    """
    rows = []
    for i in range(len(q)):
        row = []
        for j in range(len(k)):
            if turns is None:
                row.append((q[i] * k[j]).sum())
                continue
            total = q.new_zeros(())
            for p in range(q.shape[1] // 2):
                angle = turns[i][p] - turns[j][p]  # turning both is turning one by the difference
                same = q[i, 2 * p] * k[j, 2 * p] + q[i, 2 * p + 1] * k[j, 2 * p + 1]
                cross = q[i, 2 * p] * k[j, 2 * p + 1] - q[i, 2 * p + 1] * k[j, 2 * p]
                total = total + angle.cos() * same + angle.sin() * cross
            row.append(total)
        rows.append(torch.stack(row) / len(k) / ((q[i] * k.mean(dim=0)).sum() + eps))
    return torch.stack(rows)


def lin_reference(q: Tensor, k: Tensor, v: Tensor, *, eps: float) -> Tensor:
    """``sum_j w_ij v_j`` for one head."""
    return pair_weights(q, k, eps=eps) @ v


def conv_reference(v: Tensor, weight: Tensor, bias: Tensor, grid: Grid) -> Tensor:
    """Depthwise convolution of tokens (N, D), cell by cell; kernels (C, 1, s, s), shared by the D / C
    heads.
    """
    height, width = grid
    half = weight.shape[-1] // 2
    heads = v.shape[1] // len(weight)
    kernels = weight[:, 0].repeat(heads, 1, 1)  # (D, s, s)
    cells = []
    for y, x in itertools.product(range(height), range(width)):
        total = bias.repeat(heads)
        for a, b in itertools.product(range(-half, half + 1), repeat=2):
            if 0 <= y + a < height and 0 <= x + b < width:
                other = v[(y + a) * width + x + b]
                total = total + kernels[:, half + a, half + b] * other
        cells.append(total)
    return torch.stack(cells)


def interpolate_reference(x: Tensor, size: int) -> Tensor:
    """Linear interpolation of the first axis to ``size`` places."""
    old, made = len(x), []
    for i in range(size):
        place = min(max((i + 0.5) * old / size - 0.5, 0.0), old - 1.0)
        lower = math.floor(place)
        upper = min(lower + 1, old - 1)
        made.append(x[lower] * (1 - (place - lower)) + x[upper] * (place - lower))
    return torch.stack(made)


def mlla_reference(x: Tensor, w: Weights, grid: Grid, *, heads: int, eps: float = 1e-6) -> Tensor:
    """MLLA; the angles run over the whole width."""
    dim = x.shape[1]
    q, k = (_affine(x, w, "qk").chunk(2, dim=1)[i] for i in range(2))
    q, k = (torch.where(t > 0, t + 1, t.clamp(max=0).exp()) for t in (q, k))
    frequencies = [10_000.0 ** (-p / (dim // 4)) for p in range(dim // 4)]
    turns = _turns(grid, frequencies)
    out = []
    for cut in _heads(dim, heads):
        pairs = slice(cut.start // 2, cut.stop // 2)
        weights = pair_weights(q[:, cut], k[:, cut], eps=eps, turns=[t[pairs] for t in turns])
        out.append(weights @ x[:, cut])
    return torch.cat(out, dim=1) + _conv(x, w, grid)


def rala_reference(
    x: Tensor,
    w: Weights,
    grid: Grid,
    *,
    heads: int,
    eps: float = 1e-6,
    key_weights: bool = True,
) -> Tensor:
    """RALA; without ``key_weights`` every key counts once."""
    n, dim = x.shape
    q, k, v, gate = _affine(x, w, "qkvg").chunk(4, dim=1)
    quarter = dim // heads // 4
    steps = [p / (quarter - 1) if quarter > 1 else 0.0 for p in range(quarter)]
    turns = _turns(grid, [10_000.0**-step for step in steps])
    out = []
    for cut in _heads(dim, heads):
        phi_q, phi_k = (
            torch.where(t > 0, t + 1, t.clamp(max=0).exp()) for t in (q[:, cut], k[:, cut])
        )
        scores = torch.stack([(phi_q.mean(dim=0) * row).sum() for row in phi_k])
        alpha = (scores / (dim // heads) ** 0.5).exp()
        alpha = alpha / alpha.sum() if key_weights else torch.full_like(alpha, 1 / n)
        phi_k = torch.stack([n * alpha[j] * phi_k[j] for j in range(n)])
        out.append(pair_weights(phi_q, phi_k, eps=eps, turns=turns) @ v[:, cut])
    return _affine((torch.cat(out, dim=1) + _conv(v, w, grid)) * gate, w, "proj")


def polaformer_reference(
    x: Tensor,
    w: Weights,
    grid: Grid,
    *,
    heads: int,
    alpha: float = 4.0,
    reduction: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """PolaFormer, channel by channel through the signs."""
    q, gate = _affine(x, w, "qg").chunk(2, dim=1)
    k, v = _keys(x, w, grid, reduction)
    d = x.shape[1] // heads
    out = []
    for h, cut in enumerate(_heads(x.shape[1], heads)):
        scale = torch.log1p(w["scale"][h, 0].exp())
        power = 1 + alpha / (1 + (-w["power"][h, 0]).exp())
        q_plus, q_minus = _signs(q[:, cut] / scale, power)
        k_plus, k_minus = _signs(k[:, cut] / scale, power)
        features = torch.cat([k_plus, k_minus], dim=1)
        same, opposite = v[:, cut][:, : d // 2], v[:, cut][:, d // 2 :]
        out += [
            lin_reference(torch.cat([q_plus, q_minus], dim=1), features, same, eps=eps),
            lin_reference(torch.cat([q_minus, q_plus], dim=1), features, opposite, eps=eps),
        ]
    local = v if reduction == 1 else interpolate_reference(v, len(x))
    return _affine((torch.cat(out, dim=1) + _conv(local, w, grid)) * gate, w, "proj")


def focused_reference(
    x: Tensor,
    w: Weights,
    grid: Grid,
    *,
    heads: int,
    power: float = 3.0,
    reduction: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Focused linear attention; norms are of whole rows."""
    q = _affine(x, w, "q")
    k, v = _keys(x, w, grid, reduction)
    scale = torch.log1p(w["scale"].exp()).flatten()
    focused = []
    for rows in (q, k):
        t = (rows.clamp(min=0) + 1e-6) / scale
        sharp = t**power
        focused.append(
            torch.stack(
                [s * (a @ a).sqrt() / (s @ s).sqrt() for a, s in zip(t, sharp, strict=True)]
            )
        )
    out = [
        lin_reference(focused[0][:, cut], focused[1][:, cut], v[:, cut], eps=eps)
        for cut in _heads(x.shape[1], heads)
    ]
    local = v if reduction == 1 else interpolate_reference(v, len(x))
    return _affine(torch.cat(out, dim=1) + _conv(local, w, grid), w, "proj")


def agent_reference(
    x: Tensor,
    w: Weights,
    grid: Grid,
    *,
    heads: int,
    agents: int,
    front: int = 0,
    reduction: int = 1,
) -> Tensor:
    """Agent attention; biases are those of ``w`` that start with "bias."."""
    height, width = grid
    side, d = math.isqrt(agents), x.shape[1] // heads
    key_grid = (height // reduction, width // reduction)
    q = _affine(x, w, "q")
    k, v = _keys(x, w, grid, reduction, front)
    pooled = []
    for a, b in itertools.product(range(side), repeat=2):
        rows = range(a * height // side, -(-(a + 1) * height // side))
        columns = range(b * width // side, -(-(b + 1) * width // side))
        inside = [q[front + y * width + c] for y in rows for c in columns]
        pooled.append(torch.stack(inside).mean(dim=0))
    out = []
    for h, cut in enumerate(_heads(x.shape[1], heads)):
        middle = torch.stack(pooled)[:, cut]
        to_keys = middle @ k[:, cut].T / d**0.5 + _agent_bias(w, "key", h, key_grid, front)
        to_agents = q[:, cut] @ middle.T / d**0.5 + _agent_bias(w, "query", h, grid, front).T
        collected = to_keys.exp() / to_keys.exp().sum(dim=1, keepdim=True) @ v[:, cut]
        out.append(to_agents.exp() / to_agents.exp().sum(dim=1, keepdim=True) @ collected)
    cells = v[front:]
    if reduction > 1:
        lines = interpolate_reference(cells.unflatten(0, key_grid), height)
        cells = interpolate_reference(lines.transpose(0, 1), width).transpose(0, 1).flatten(0, 1)
    local = torch.cat([torch.zeros_like(x[:front]), _conv(cells, w, grid)])
    return _affine(torch.cat(out, dim=1) + local, w, "proj")


def _agent_bias(w: Weights, side: str, head: int, grid: Grid, front: int) -> Tensor:
    """(a, front + cells)."""
    maps = w.get("bias.keys" if side == "key" else "bias.queries")
    if maps is None:
        return torch.zeros(1, 1)
    made = interpolate_reference(maps[head].movedim(1, 0), grid[0])  # (h, a, 7)
    made = interpolate_reference(made.movedim(2, 0), grid[1]).permute(2, 1, 0)  # (a, h, w)
    if f"bias.{side}_rows" in w:
        rows = interpolate_reference(w[f"bias.{side}_rows"][head].T, grid[0]).T
        columns = interpolate_reference(w[f"bias.{side}_columns"][head].T, grid[1]).T
        made = made + rows[:, :, None] + columns[:, None, :]
    ahead = w.get(f"bias.{side}_front")
    ahead = maps.new_zeros(maps.shape[1], front) if ahead is None else ahead[head]
    return torch.cat([ahead, made.flatten(1)], dim=1)


def _keys(x: Tensor, w: Weights, grid: Grid, side: int, front: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values, after a reduction if there is one, the keys with their codes."""
    if side > 1:
        reduced, width = [], grid[1]
        for y, c in itertools.product(range(grid[0] // side), range(width // side)):
            total = w["reduce.conv.bias"]
            for a, b in itertools.product(range(side), repeat=2):
                cell = x[front + (y * side + a) * width + c * side + b]
                total = total + w["reduce.conv.weight"][:, :, a, b] @ cell
            centred = total - total.mean()
            normed = centred / (centred.square().mean() + 1e-5).sqrt()
            reduced.append(normed * w["reduce.norm.weight"] + w["reduce.norm.bias"])
        x = torch.cat([x[:front], torch.stack(reduced)])
    k, v = _affine(x, w, "kv").chunk(2, dim=1)
    codes = w.get("positions.table")
    return (k if codes is None else k + codes[0]), v


def _signs(t: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """``relu(t)^p`` and ``relu(-t)^p``; where the sign is the other, 0 without a gradient."""
    positive, size = t > 0, t.abs() ** power
    return torch.where(positive, size, 0.0), torch.where(positive, 0.0, size)


def _turns(grid: Grid, frequencies: Sequence[float]) -> list[Tensor]:
    """Angles of every token: all frequencies for its row, then all for its column."""
    cells = itertools.product(range(grid[0]), range(grid[1]))
    return [
        torch.tensor([place * f for place in cell for f in frequencies], dtype=torch.float64)
        for cell in cells
    ]


def _affine(x: Tensor, w: Weights, name: str) -> Tensor:
    made = x @ w[f"{name}.weight"].T
    return made + w[f"{name}.bias"] if f"{name}.bias" in w else made


def _conv(v: Tensor, w: Weights, grid: Grid) -> Tensor:
    return conv_reference(v, w["lepe.conv.weight"], w["lepe.conv.bias"], grid)


def _heads(dim: int, heads: int) -> list[slice]:
    d = dim // heads
    return [slice(h * d, (h + 1) * d) for h in range(heads)]
