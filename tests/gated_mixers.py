"""What the tests of the gated linear attentions share: small layers, and the slow form of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effformer.attention import Attention
from effformer.attention.reference_gated import gated_reference
from effformer.blocks.stack import with_causal
from effformer.config import resolve
from effformer.context import Rope
from effformer.site import Site

DIM, HEADS, LAYER, DEPTH = 16, 4, 1, 3
NAMES = ["delta", "gated-delta", "gla", "kda", "lightning", "retention", "simple-gla", "ssd"]


def make(
    name: str, *, causal: bool = True, std: float = 0.4, layer: int = LAYER, **options: Any
) -> Any:
    """A layer in double precision with weights away from their start."""
    config = with_causal(resolve("attention", {"name": name, **options}), causal)
    part = config.build(Site(dim=DIM, heads=HEADS, layer=layer, depth=DEPTH, path="here"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in part.parameters():
            p.copy_(torch.empty(p.shape, dtype=torch.float64).normal_(std=std, generator=generator))
    return part.double().eval()


def tokens(n: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, n, DIM, dtype=torch.float64, generator=generator)


def turns(n: int, width: int = DIM // HEADS) -> Rope:
    """Rotary tables of one axis, in pairs of halves."""
    angles = torch.arange(n)[:, None] * 0.5 ** torch.arange(width // 2, dtype=torch.float64)
    angles = torch.cat([angles, angles], dim=-1)
    return Rope(angles.cos(), angles.sin())


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal but for rounding of numbers as large as the largest."""
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def obvious(part: Attention, x: Tensor, rope: Rope | None = None) -> Tensor:
    """The causal layer, one token at a time in float64."""
    weights, core = dict(part.named_parameters()), part.core.config
    joined = x @ weights["qkv.weight"].T
    if part.config.short_conv:
        joined = _convolved(joined, weights["conv.weight"], weights.get("conv.bias"))
    groups = part.config.qk_heads or HEADS
    width, values = part.head_dim, part.value_dim
    q, k, v = joined.split([groups * width, groups * width, HEADS * values], dim=-1)
    q, k, v = _heads(q, groups), _heads(k, groups), _heads(v, HEADS)
    if rope is not None:
        q, k = (_turned(y, rope) for y in (q, k))
    name, scale, d = core.entry.name, width**-0.5, None
    if name in ("delta", "gated-delta", "kda"):
        q, k = (y / (y.square().sum(-1, keepdim=True) + core.eps).sqrt() for y in (q, k))
    if name == "ssd":
        raw = _input(weights, "time", x)[..., 0] + weights["core.bias"][:, None]
        scale, d = 1.0, (1 + raw.exp()).log().clamp(core.least, core.most)
    written = v if d is None else v * d[..., None]
    o, _ = gated_reference(
        q, k, written, _decay(name, core, weights, x, d), _beta(core, weights, x),
        delta=name in ("delta", "gated-delta", "kda"), scale=scale,
    )  # fmt: skip
    if name == "ssd":
        o = o + weights["core.skip"][:, None, None] * v
    o = _gated(part, weights, o, x).transpose(1, 2).flatten(2)
    return o @ weights["proj.weight"].T


def _heads(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, width = [], weight.shape[-1]
    for t in range(x.shape[1]):
        row = torch.zeros_like(x[:, 0]) if bias is None else bias.expand_as(x[:, 0])
        for i in range(width):
            if t - width + 1 + i >= 0:
                row = row + weight[:, 0, i] * x[:, t - width + 1 + i]
        rows.append(row / (1 + (-row).exp()))
    return torch.stack(rows, dim=1)


def _turned(x: Tensor, rope: Rope) -> Tensor:
    """Pairs of channels as complex numbers."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half], x[..., half:])
    numbers = numbers * torch.complex(rope.cos[:, :half], rope.sin[:, :half])
    return torch.cat([numbers.real, numbers.imag], dim=-1)


def _input(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """(B, H, N, width)."""
    if (plain := weights.get(f"inputs.{name}.weight")) is not None:
        return _heads(x @ plain.T)
    y = x @ weights[f"inputs.{name}.0.weight"].T @ weights[f"inputs.{name}.1.weight"].T
    bias = weights.get(f"inputs.{name}.1.bias")
    return _heads(y if bias is None else y + bias)


def _decay(
    name: str, core: Any, weights: dict[str, Tensor], x: Tensor, d: Tensor | None
) -> Tensor | None:
    head = torch.arange(HEADS, dtype=torch.float64)
    if name == "delta":
        return None
    if name == "retention":
        return (1 - 2 ** (-5 - head)).log()
    if name == "lightning":
        return -8 * head / HEADS * (1 - LAYER / DEPTH)
    if d is not None:
        return -weights["core.rate"].exp()[:, None] * d
    raw = _input(weights, "decay", x)
    if name in ("gla", "simple-gla"):
        g = -(1 + (-raw).exp()).log() / core.slowness
        return g if name == "gla" else g[..., 0]
    rate = weights["core.rate"].exp()
    if name == "gated-delta":
        raw = raw[..., 0] + weights["core.bias"][:, None]
        return -rate[:, None] * (1 + raw.exp()).log()
    raw = raw + weights["core.bias"][:, None]
    if core.bound is not None:
        return core.bound / (1 + (-rate[:, None, None] * raw).exp())
    return -rate[:, None, None] * (1 + raw.exp()).log()


def _beta(core: Any, weights: dict[str, Tensor], x: Tensor) -> Tensor | None:
    if "inputs.beta.weight" not in weights:
        return None
    return (2 if core.negative else 1) / (1 + (-_input(weights, "beta", x)[..., 0]).exp())


def _gated(part: Attention, weights: dict[str, Tensor], o: Tensor, x: Tensor) -> Tensor:
    """Norm and gate of the outputs (B, H, N, V)."""
    gate: Any = part.config.gate
    act = 1.0
    if gate.per != "none":
        y = x
        for key in ("output.proj.weight", "output.proj.0.weight", "output.proj.1.weight"):
            y = y @ weights[key].T if key in weights else y
        for key in ("output.proj.bias", "output.proj.1.bias"):
            y = y + weights[key] if key in weights else y
        raw = _heads(y)
        act = 1 / (1 + (-raw).exp()) * (raw if gate.act == "silu" else 1)
    if gate.first:
        o = o * act
    weight, groups = weights["output.weight"], HEADS
    if gate.norm == "groups":
        weight, groups = weight.unflatten(0, (HEADS, 1, -1)), gate.groups
    rows = o.unflatten(1, (groups, -1))
    o = (rows / (rows.square().mean(dim=(2, 4), keepdim=True) + gate.eps).sqrt()).flatten(1, 2)
    return o * weight if gate.first else o * weight * act
