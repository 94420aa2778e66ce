"""Zeros in weights: how many, where, and that they stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effformer.compress import sparsify
from effformer.compress.prune.masks import cubic, n_of_m_mask
from torch import nn


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    "scheme",
    [{}, {"scope": "global"}, {"kind": "n:m"}, {"kind": "block"}, {"kind": "wanda"}],
    ids=lambda s: "-".join(s.values()) or "plain",
)
def test_half_of_the_weights_are_zero(net: nn.Sequential, scheme: dict[str, Any]) -> None:
    small, masks = sparsify(net, scheme, data=torch.randn(5, 16))
    assert masks.sparsity == 0.5
    for path, mask in masks.masks.items():
        before, after = (n.get_submodule(path).weight for n in (net, small))
        assert torch.equal(after, before * mask)
    assert (net[0].weight != 0).all()


def test_zeros_stay_while_the_rest_is_trained(net: nn.Sequential) -> None:
    small, masks = sparsify(net, {"kind": "n:m"}, "0")
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(torch.randn(3, 16)).square().sum().backward()
    optimizer.step()
    masks.apply_(small)
    assert (small[0].weight.unflatten(1, (-1, 4)) != 0).sum(dim=2).eq(2).all()
    assert (small[2].weight != 0).all()


def test_the_schedule_ends_exactly() -> None:
    steps = [cubic(s, 10, 20, 0.1, 0.9) for s in range(40)]
    assert steps[:11] == [pytest.approx(0.1)] * 11
    assert steps[30:] == [0.9] * 10
    assert steps == sorted(steps)


def test_refusals(net: nn.Sequential) -> None:
    with pytest.raises(ValueError, match="do not divide into runs of 3"):
        n_of_m_mask(torch.ones(2, 4), 2, 3)
    with pytest.raises(
        ValueError, match=r"sparsify: 2: block: \(4, 8\) does not divide .* leave it out"
    ):
        sparsify(net, {"kind": "block", "tile": (8, 8)})
    with pytest.raises(ValueError, match="'wanda' is measured on data="):
        sparsify(net, {"kind": "wanda"})
    with pytest.raises(ValueError, match="scope='layer' would do"):
        sparsify(net, {"kind": "n:m", "scope": "global"})
    with pytest.raises(ValueError, match="matches no module"):
        sparsify(net, where="7")
    with pytest.raises(ValueError, match="has no linear layer"):
        sparsify(nn.Sequential(nn.GELU()))
