"""Attention and FFN beside each other, as one branch (FLUX's single blocks)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from effformer.blocks import Parallel
from effformer.config import resolve
from effformer.context import Context, Packing
from effformer.site import Site

DIM, HEADS, N = 24, 3, 7


def build(*, fused: bool = True, cond: bool = True, **options: Any) -> Parallel:
    torch.manual_seed(0)
    site = Site(dim=DIM, heads=HEADS, cond_dim=DIM if cond else None, **options)
    parts = {"attn": resolve("attention", "softmax"), "ffn": resolve("ffn", "mlp")}
    block: Parallel = Parallel.Config(fused=fused).build(site, **parts)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.3)
    return block.double().eval()


@pytest.mark.parametrize("scaled", [None, 0.5])
def test_one_modulation_and_fused_projections(scaled: float | None) -> None:
    """One matrix in front of both branches and one behind them, as the official code has them."""
    block = build(layer_scale=scaled)
    x, cond = torch.randn(2, N, DIM).double(), torch.randn(2, DIM).double()
    attn, ffn, made = block.attn.part, block.ffn.part, block.modulation.linear
    assert attn.proj.bias is None
    shift, scale, gate = (F.silu(cond) @ made.weight.T + made.bias)[:, None].chunk(3, dim=-1)
    h = F.layer_norm(x, (DIM,), eps=1e-6) * (1 + scale) + shift
    linear1 = torch.cat([attn.qkv.weight, ffn.fc1.weight])
    rows = h @ linear1.T + torch.cat([attn.qkv.bias, ffn.fc1.bias])
    qkv, hidden = rows.split([3 * DIM, 4 * DIM], dim=-1)
    q, k, v = (s.unflatten(-1, (HEADS, -1)).transpose(1, 2) for s in qkv.chunk(3, dim=-1))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    linear2 = torch.cat([attn.proj.weight, ffn.fc2.weight], dim=1)
    y = torch.cat([mixed, F.gelu(hidden, approximate="tanh")], -1) @ linear2.T + ffn.fc2.bias
    y = y if scaled is None else y * block.layer_scale
    torch.testing.assert_close(block(x, Context(cond=cond)), x + gate * y)
    assert (
        block.macs(N) == 3 * DIM * DIM + N * (linear1.numel() + linear2.numel()) + 2 * N * N * DIM
    )


def test_without_conditioning_it_has_one_bias_less() -> None:
    fused, plain = build(cond=False), build(fused=False, cond=False)
    state = plain.state_dict() | {"attn.part.proj.bias": torch.zeros(DIM)}
    plain.load_state_dict(state)
    assert fused.state_dict().keys() == state.keys() - {"attn.part.proj.bias"}
    fused.load_state_dict({k: v for k, v in state.items() if k != "attn.part.proj.bias"})
    x = torch.randn(2, N, DIM).double()
    torch.testing.assert_close(fused(x), plain(x))


def test_packed_rows_are_modulated_sample_by_sample() -> None:
    block = build()
    x, cond = torch.randn(3, N, DIM).double(), torch.randn(3, DIM).double()
    mask = torch.arange(N) < torch.tensor([4, N, 1])[:, None]
    packing = Packing.from_mask(mask)
    packed = packing.unpack(block(packing.pack(x), Context(cond=cond, packing=packing)))
    padded = block(x, Context(cond=cond, mask=mask))
    torch.testing.assert_close(packed[mask], padded[mask])
