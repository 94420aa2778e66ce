"""Leaky integrate-and-fire neurons: values, surrogate gradients, state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from effformer.nn.lif import LIF

VARIANTS: list[dict[str, Any]] = [
    {},
    {"tau": 3.0, "threshold": 0.5},
    {"detach_reset": False},
    {"decay_input": False},
    {"reset": -0.3},
    {"reset": -0.3, "decay_input": False, "detach_reset": False},
    {"reset": None},
    {"reset": None, "detach_reset": False, "alpha": 2.0},
]


def by_hand(x: list[float], c: LIF.Config) -> tuple[list[float], float]:
    """One neuron in plain numbers."""
    rest = c.reset or 0.0
    v, spikes = rest, []
    for value in x:
        v = v + (value - (v - rest)) / c.tau if c.decay_input else v - (v - rest) / c.tau + value
        spikes.append(float(v >= c.threshold))
        if spikes[-1]:
            v = v - c.threshold if c.reset is None else c.reset
    return spikes, v


def unrolled(x: Tensor, v: Tensor, c: LIF.Config) -> tuple[Tensor, Tensor]:
    """The equations, token by token, differentiated by autograd."""
    fired, rest = [], c.reset or 0.0
    for token in x.unbind(1):
        charged = v + (token - (v - rest)) / c.tau
        if not c.decay_input:
            charged = v - (v - rest) / c.tau + token
        soft = torch.sigmoid(c.alpha * (charged - c.threshold))
        spike = (charged >= c.threshold).to(x.dtype) + (soft - soft.detach())
        resets = spike.detach() if c.detach_reset else spike
        v = charged - resets * c.threshold
        if c.reset is not None:
            v = (1 - resets) * charged + resets * c.reset
        fired.append(spike)
    return torch.stack(fired, dim=1), v


@pytest.mark.parametrize("options", VARIANTS)
def test_values(options: dict[str, Any]) -> None:
    config = LIF.Config(**options)
    x = torch.randn(3, 40, 2, dtype=torch.float64) * 2
    spikes, v = LIF(config)(x)
    assert 0.05 < spikes.mean() < 0.95
    for b in range(3):
        for d in range(2):
            expected, last = by_hand(x[b, :, d].tolist(), config)
            assert spikes[b, :, d].tolist() == expected
            assert v[b, d].item() == pytest.approx(last, abs=1e-12)


@pytest.mark.parametrize("options", VARIANTS)
def test_the_gradient_is_that_of_the_unrolled_equations(options: dict[str, Any]) -> None:
    config = LIF.Config(**options)
    x = (torch.randn(2, 30, 3, dtype=torch.float64) * 2).requires_grad_()
    v = torch.rand(2, 3, dtype=torch.float64).requires_grad_()
    g, h = torch.randn(2, 30, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    results = []
    for spikes, last in (LIF(config)(x, v), unrolled(x, v, config)):
        grads = torch.autograd.grad((spikes * g).sum() + (last * h).sum(), (x, v))
        results.append((spikes, last, *grads))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert torch.equal(results[0][0], results[1][0])


def test_the_surrogate_is_the_slope_of_a_sigmoid() -> None:
    x = torch.tensor([[[1.7]]], dtype=torch.float64, requires_grad=True)
    LIF(LIF.Config(alpha=4.0))(x)[0].sum().backward()
    soft = torch.sigmoid(torch.tensor(4 * (0.85 - 1), dtype=torch.float64))
    assert x.grad is not None
    assert x.grad.item() == pytest.approx((4 * soft * (1 - soft) / 2).item())


def test_pieces_equal_the_whole() -> None:
    lif, x = LIF(LIF.Config()), torch.randn(2, 20, 4) * 2
    whole, end = lif(x)
    v, pieces = lif.init_state(2, 4, like=x), []
    for piece in x.split([1, 7, 12], dim=1):
        spikes, v = lif(piece, v)
        pieces.append(spikes)
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(v, end)


def test_bad_configs() -> None:
    with pytest.raises(ValueError, match="tau must be above 1, got 1"):
        LIF.Config(tau=1.0)
    with pytest.raises(ValueError, match="threshold must exceed the reset potential"):
        LIF.Config(threshold=0.2, reset=0.5)


@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[-1]])
def test_one_compiled_graph_serves_every_length_forward_and_backward(
    options: dict[str, Any],
) -> None:
    lif, counter = LIF(LIF.Config(**options)), CompileCounterWithBackend("aot_eager")
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(lif, fullgraph=True, dynamic=True, backend=counter)
    for n in (5, 300, 7):
        x = (torch.randn(2, n, 3) * 2).requires_grad_()
        for found, expected in zip(compiled(x), lif(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        grads = [torch.autograd.grad(form(x)[0].sum(), x)[0] for form in (compiled, lif)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1] > 0
