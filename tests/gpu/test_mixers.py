"""Every token mixer on a CUDA device, against the same weights in float64 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import MIXERS, caps_of, context_for, make_mixer, spikes, tokens
from torch import Tensor, nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMS = [(n, c) for n in MIXERS for c in (False, True) if caps_of(n).satisfies(causal=c)]
SLACK = {torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
CHOOSES = ("reformer", "topk")
"""Hashes and ranks flip where numbers are rounded."""


def run(part: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of the tokens."""
    x = x.clone().requires_grad_()
    out = part(x, context_for(part, x))
    out.float().square().mean().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def far(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((actual.double().cpu() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_equals_the_cpu(name: str, causal: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    part: Any = make_mixer(name, causal=causal).to(dtype)
    x = tokens(dtype=dtype)
    expected = [y.detach().clone() for y in run(part.double(), x.double())]
    found = run(part.to(dtype).cuda(), x.cuda())
    assert all(y.isfinite().all() for y in found)
    if dtype != torch.float32 and (name in CHOOSES or spikes(part)):
        return
    assert far(found[0], expected[0]) < SLACK[dtype]
    if dtype == torch.float32:
        assert far(found[1], expected[1]) < 1e-3


@pytest.mark.parametrize("name", MIXERS)
def test_autocast_stays_finite(name: str) -> None:
    part = make_mixer(name).cuda()
    x = tokens().cuda()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            out = part(x, context_for(part, x))
        assert out.isfinite().all()
