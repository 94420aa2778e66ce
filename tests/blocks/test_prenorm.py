"""The ordinary blocks: equations."""

from __future__ import annotations

from typing import Any

import torch

from effformer.attention import Attention
from effformer.blocks import AdaLNZero, Parallel, PostNorm, PreNorm, ResPost
from effformer.context import EMPTY, Context
from effformer.ffn import MLP
from effformer.site import NormRule, Site

DIM = 12
PARTS: dict[str, Any] = {"attn": Attention.Config(), "ffn": MLP.Config()}


def build(kind: type[Any]) -> Any:
    block = kind(kind.Config(), Site(dim=DIM, heads=3), **PARTS)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.eval()


def test_prenorm() -> None:
    block, x = build(PreNorm), torch.randn(2, 5, DIM)
    y = x + block.attn.part(block.attn.norm(x), EMPTY)
    torch.testing.assert_close(block(x), y + block.ffn.part(block.ffn.norm(y), EMPTY))


def test_modulated_norms_have_learned_factors_on_request_only() -> None:
    for kind in (AdaLNZero, Parallel):
        for affine, count in ((False, 0), (True, DIM)):
            site = Site(
                dim=DIM, heads=3, cond_dim=5, norm=NormRule(kind="rms", modulated_affine=affine)
            )
            block = kind(kind.Config(), site, **PARTS)
            norm = block.norm if kind is Parallel else block.ffn.norm
            assert sum(p.numel() for p in norm.parameters()) == count


def test_modulation_without_shifts() -> None:
    site = Site(dim=DIM, heads=3, cond_dim=5)
    block = AdaLNZero(AdaLNZero.Config(shift=False), site, **PARTS)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert block.modulation.linear.out_features == 4 * DIM
    cond, x = torch.randn(2, 5), torch.randn(2, 7, DIM)
    a, b, c, d = block.modulation(cond)
    y = x + b * block.attn.part(block.attn.norm(x) * (1 + a), EMPTY)
    y = y + d * block.ffn.part(block.ffn.norm(y) * (1 + c), EMPTY)
    torch.testing.assert_close(block(x, Context(cond=cond)), y)
    assert block.macs(7) == 5 * 4 * DIM + block.attn.part.macs(7) + block.ffn.part.macs(7)


def test_postnorm() -> None:
    block, x = build(PostNorm), torch.randn(2, 5, DIM)
    y = block.attn.norm(x + block.attn.part(x, EMPTY))
    torch.testing.assert_close(block(x), block.ffn.norm(y + block.ffn.part(y, EMPTY)))


def test_respost() -> None:
    block, x = build(ResPost), torch.randn(2, 5, DIM)
    y = x + block.attn.norm(block.attn.part(x, EMPTY))
    torch.testing.assert_close(block(x), y + block.ffn.norm(block.ffn.part(y, EMPTY)))


def test_parallel() -> None:
    block, x = build(Parallel), torch.randn(2, 5, DIM)
    h = block.norm(x)
    torch.testing.assert_close(block(x), x + block.attn.part(h, EMPTY) + block.ffn.part(h, EMPTY))
