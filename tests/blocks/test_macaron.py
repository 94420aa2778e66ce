"""The Macaron block: its equations, half steps, folding, every attention inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import caps_of

from effformer import registry
from effformer.attention import Attention
from effformer.blocks import Block, Macaron, PreNorm
from effformer.blocks.stack import with_causal
from effformer.build import list_attention
from effformer.config import resolve
from effformer.context import EMPTY, Context
from effformer.ffn import MLP
from effformer.site import Site

DIM = 12


def build(*, attn: Any = "softmax", causal: bool = False, **config: Any) -> Macaron:
    mixer = with_causal(resolve("attention", attn), causal)
    ffn = MLP.Config(act="relu")
    block = Macaron(Macaron.Config(**config), Site(dim=DIM, heads=3, length=8), attn=mixer, ffn=ffn)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.eval()


@pytest.mark.parametrize("factor", [0.5, 0.3])
def test_prenorm_equations(factor: float) -> None:
    block, x = build(factor=factor), torch.randn(2, 5, DIM)
    one, attn, two = block.branches
    y = x + factor * one.part(one.norm(x), EMPTY)
    y = y + attn.part(attn.norm(y), EMPTY)
    y = y + factor * two.part(two.norm(y), EMPTY)
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("factor", [0.5, 0.3])
def test_postnorm_equations(factor: float) -> None:
    block, x = build(post_norm=True, factor=factor), torch.randn(2, 5, DIM)
    one, attn, two = block.branches
    y = one.norm(x + factor * one.part(x, EMPTY))
    y = attn.norm(y + attn.part(y, EMPTY))
    y = two.norm(y + factor * two.part(y, EMPTY))
    torch.testing.assert_close(block(x), y)


def test_without_ffns_attention_is_left() -> None:
    block, x = build(), torch.randn(2, 5, DIM)
    for ffn in (block.ffn1.part, block.ffn2.part):
        torch.nn.init.zeros_(ffn.fc2.weight)
        torch.nn.init.zeros_(ffn.fc2.bias)
    torch.testing.assert_close(block(x), x + block.attn.part(block.attn.norm(x), EMPTY))


def test_the_halves_are_two_networks_of_half_the_width() -> None:
    block = build()
    assert block.ffn1.part is not block.ffn2.part
    assert block.ffn1.part.hidden == block.ffn2.part.hidden == 2 * DIM
    plain = PreNorm(
        PreNorm.Config(), Site(dim=DIM, heads=3), attn=Attention.Config(), ffn=MLP.Config()
    )

    def count(block: Block) -> int:
        return sum(p.numel() for p in block.parameters())

    assert count(block) - count(plain) == 3 * DIM  # one output bias and one norm


def test_the_factor_folds_into_the_weights() -> None:
    block, x = build(), torch.randn(2, 5, DIM)
    y = block(x)
    for branch in (block.ffn1, block.ffn2):
        branch.factor = 1.0
        with torch.no_grad():
            branch.part.fc2.weight.mul_(0.5)
            branch.part.fc2.bias.mul_(0.5)
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-6)


def test_the_leading_network_may_have_its_own_width() -> None:
    block = build(first_hidden=7)
    assert [b.part.hidden for b in (block.ffn1, block.ffn2)] == [7, 2 * DIM]
    assert block(torch.randn(2, 5, DIM)).shape == (2, 5, DIM)


def test_options_survive_json() -> None:
    config = Macaron.Config(factor=0.3, first_hidden=7, first_act="gelu", share=1.0)
    assert Macaron.Config.from_dict(config.to_dict()) == config


def test_first_activation() -> None:
    block = build(first_act="gelu")
    assert [b.part.config.act for b in (block.ffn1, block.ffn2)] == ["gelu", "relu"]


@pytest.mark.parametrize("attn", list_attention(axes=""))
def test_any_attention_fits(attn: str) -> None:
    x = torch.randn(2, 5, DIM)
    options: dict[str, Any] = {"tdsm": {"groups": 1, "unit": 4, "segments": 1}}.get(attn, {})
    if attn in registry.core:
        options = {"head_dim": 4}
    spec = {"name": attn, **options}
    ctx = Context(grid=(1, 5)) if caps_of(attn).axes else EMPTY
    assert build(attn=spec)(x, ctx).shape == x.shape


@pytest.mark.parametrize("attn", list_attention(causal=True, axes=""))
def test_causal_attention_keeps_the_block_causal(attn: str) -> None:
    block, x = build(attn=attn, causal=True), torch.randn(2, 7, DIM)
    changed = torch.cat([x[:, :4], torch.randn(2, 3, DIM)], dim=1)
    torch.testing.assert_close(block(changed)[:, :4], block(x)[:, :4], rtol=1e-5, atol=1e-6)


def test_bad_configs() -> None:
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
            Macaron.Config(share=share)
    with pytest.raises(ValueError, match=r"factor must be positive, got 0\.0"):
        Macaron.Config(factor=0.0)
    with pytest.raises(ValueError, match="first_hidden must be at least 1"):
        build(first_hidden=0)
    with pytest.raises(ValueError, match="post_norm has no conditioned form"):
        Macaron(
            Macaron.Config(post_norm=True),
            Site(dim=DIM, heads=3, cond_dim=4),
            attn=Attention.Config(),
            ffn=MLP.Config(),
        )
