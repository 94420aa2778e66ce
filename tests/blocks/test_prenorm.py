"""The ordinary blocks: equations."""

from __future__ import annotations

from typing import Any

import torch

from effformer.attention import Attention
from effformer.blocks import Parallel, PostNorm, PreNorm, ResPost
from effformer.context import EMPTY, Site
from effformer.ffn import MLP

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
