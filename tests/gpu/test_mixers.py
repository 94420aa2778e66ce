"""Every part on a device, against the same weights in float64 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import (
    BLOCKS,
    FFNS,
    MIXERS,
    caps_of,
    context_for,
    make_block,
    make_ffn,
    make_mixer,
    spikes,
    tokens,
)
from devices import DEVICES
from torch import Tensor, nn

from effformer import registry
from effformer.testing.precision import KINDS, assert_near, lowered, passed

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]
PARTS = [
    ("attention", n, c) for n in MIXERS for c in (False, True) if caps_of(n).satisfies(causal=c)
]
PARTS += [("ffn", n, False) for n in FFNS] + [("block", n, False) for n in BLOCKS]
CHOOSES = ("acm", "moe", "reformer", "topk")
"""Hashes, ranks and gates flip where numbers are rounded, as spikes do."""
LONG = ("flow", "sana", "gla", "gated-delta", "kda", "ssd", "retention")


def made(kind: str, name: str, causal: bool) -> nn.Module:
    if kind == "attention":
        return make_mixer(name, causal=causal)
    if kind == "ffn":
        return make_ffn(name)
    return make_block(name, cond=registry.block.get(name).caps.cond != "never")


def call(part: nn.Module, x: Tensor) -> Tensor:
    return part(x, context_for(part, x))


def largest(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((actual.double().cpu() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("kind", "name", "causal"), PARTS)
def test_float32(kind: str, name: str, causal: bool, device: str) -> None:
    part, x = made(kind, name, causal), tokens()
    weights = torch.randn_like(x).double()
    found = passed(part.to(device), x.to(device), call, weights, None)
    right = passed(part.cpu().double(), x.double(), call, weights, None)
    assert largest(found.out, right.out) < 2e-4
    assert largest(found.grad, right.grad) < 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize(("kind", "name", "causal"), PARTS)
def test_half(kind: str, name: str, causal: bool, precision: str, device: str) -> None:
    part, x = made(kind, name, causal), tokens()
    if not spikes(part) and name not in CHOOSES:
        assert_near(part, x * 10, precision, call, device=device)
        return
    low, x, _ = lowered(part, x, precision)
    weights = torch.randn_like(x).double()
    found: Any = passed(low.to(device), x.to(device), call, weights, KINDS[precision][1])
    assert found.out.isfinite().all()
    assert found.grad.isfinite().all()


@pytest.mark.parametrize("n", [4096, 16384, 65536])
@pytest.mark.parametrize("name", LONG)
def test_many_tokens(name: str, n: int, device: str) -> None:
    if device == "cpu" and n > 4096:
        pytest.skip("minutes on a CPU")
    x, here = tokens(n, 1), {"device": device, "exact_on": device}
    assert_near(make_mixer(name), x, "bfloat16", call, **here, backward=False)
