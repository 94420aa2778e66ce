"""The gated transformer block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import effformer
from effformer.attention import Attention
from effformer.blocks import Gated
from effformer.ffn import SwiGLU
from effformer.site import Site


def build(layer: int, unit: int) -> Gated:
    site = Site(dim=12, heads=3, layer=layer, path="b")
    block = Gated(
        Gated.Config(unit=unit), site, attn=Attention.Config(qkv_bias=False), ffn=SwiGLU.Config()
    )
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    return block.eval()


def test_a_unit_ends_with_a_norm_of_the_tokens() -> None:
    x = torch.randn(2, 5, 12)
    inner, last = build(2, 2), build(3, 2)
    assert isinstance(inner.norm, nn.Identity)
    h = x + inner.attn.part(inner.attn.norm(x))
    torch.testing.assert_close(inner(x), h + inner.ffn.part(inner.ffn.norm(h)))
    h = x + last.attn.part(last.attn.norm(x))
    torch.testing.assert_close(last(x), last.norm(h + last.ffn.part(last.ffn.norm(h))))


def test_the_name_reaches_it_in_any_model() -> None:
    model = effformer.build_model("vit-nano", block={"name": "gated", "unit": 2}, ffn="swiglu")
    ends = [isinstance(block.norm, nn.LayerNorm) for block in model.blocks]
    assert ends == [(i + 1) % 2 == 0 for i in range(len(ends))]
    assert {type(block.ffn.part).__name__ for block in model.blocks} == {"SwiGLU"}


def test_units_are_positive() -> None:
    with pytest.raises(ValueError, match="unit must be at least 1, got 0"):
        Gated.Config(unit=0)
