"""Compare a core with its definition for one head of one sample, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from closeness import assert_close
from torch import Tensor

from effformer.attention import Core
from effformer.context import Context
from effformer.profile import Counter
from effformer.site import Site

HEADS, WIDTH = 3, 8
SITE = Site(dim=HEADS * WIDTH, heads=HEADS)


def qkv(n: int = 13, m: int | None = None, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    def draw(length: int) -> Tensor:
        return torch.randn(batch, HEADS, length, WIDTH, dtype=torch.float64, requires_grad=True)

    keys = n if m is None else m
    return draw(n), draw(keys), draw(keys)


def each_head(one: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = [[one(q[b, h], k[b, h], v[b, h]) for h in range(q.shape[1])] for b in range(q.shape[0])]
    return torch.stack([torch.stack(r) for r in rows])


def assert_same(core: Core, one: Callable[..., Tensor], n: int = 13, m: int | None = None) -> None:
    """Values and gradients of a core equal those of its definition ``one(q, k, v)``."""
    core = core.double()
    inputs = qkv(n, m)
    memory = None if m is None else torch.empty(2, m, HEADS * WIDTH)
    fast, slow = core(*inputs, Context(memory=memory)), each_head(one, *inputs)
    assert_close(fast, slow, rtol=1e-10, atol=1e-11)
    cotangent = torch.randn_like(fast)
    ours = torch.autograd.grad((fast * cotangent).sum(), inputs)
    theirs = torch.autograd.grad((slow * cotangent).sum(), inputs)
    assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def assert_counted(core: Core, n: int = 13, m: int | None = None) -> None:
    """Analytic multiply-adds of one sample equal those of the operators."""
    inputs = [x.detach() for x in qkv(n, m, batch=1)]
    memory = None if m is None else torch.empty(1, m, HEADS * WIDTH)
    with Counter(core) as counter:
        core.double()(*inputs, Context(memory=memory))
    traced = sum(tally.macs for tally in counter.rows.values())
    assert core.macs(n, m, heads=HEADS, head_dim=WIDTH) == traced
