"""Legendre memory units, dense and spiking: against loops, streams, masks, casts, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import effformer
from effformer.attention import LMU, SpikingLMU
from effformer.attention.reference import lmu_reference
from effformer.checks import CapabilityError
from effformer.context import Context, Packing
from effformer.nn.lif import LIF
from effformer.site import Site

SITE = Site(dim=6, out_dim=5)


def dense(**options: Any) -> LMU:
    return LMU(LMU.Config(**options), SITE).double().eval()


def spiking(**options: Any) -> SpikingLMU:
    config = SpikingLMU.Config(lif=LIF.Config(threshold=0.3), **options)
    part = SpikingLMU(config, SITE).double()
    with torch.no_grad():
        for _ in range(40):  # running statistics of the norms
            part(torch.randn(4, 50, 6, dtype=torch.float64))
    return part.eval()


def tokens(n: int = 30, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, n, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory": 9, "theta": 12.0},
        {"memory": 4, "hidden": 11, "theta": 40.0},
        {"memory": 3, "theta": 200.0, "proj": False},
    ],
)
@pytest.mark.parametrize("n", [1, 30, 500])
def test_equals_the_loop(options: dict[str, Any], n: int) -> None:
    part, x = dense(**options), tokens(n).requires_grad_()
    out = part(x)
    expected = torch.stack([lmu_reference(row, part) for row in x])
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
    weights, cotangent = [x, *part.parameters()], torch.randn_like(out)
    ours = torch.autograd.grad(out, weights, cotangent)
    theirs = torch.autograd.grad(expected, weights, cotangent)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("pieces", [[1] * 30, [7, 1, 22], [30]])
@pytest.mark.parametrize("make", [dense, spiking])
def test_streams(make: Any, pieces: list[int]) -> None:
    part, x = make(memory=7, theta=10.0), tokens()
    whole, outputs = part(x), []
    state = part.init_state(2, like=x)
    for piece in x.split(pieces, dim=1):
        out, state = part.step(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-9, atol=1e-9)
    assert [s.shape for s in state] == [s.shape for s in part.init_state(2, like=x)]


def test_spikes_of_a_stream_are_the_same_bits() -> None:
    part, x = spiking(memory=7, theta=10.0, proj=False), tokens(60)
    spikes = part(x)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    state, outputs = part.init_state(2, like=x), []
    for piece in x.split(1, dim=1):
        out, state = part.step(piece, state)
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, dim=1), spikes)
    assert torch.equal(part(x), spikes)


def test_the_spiking_unit_written_out() -> None:
    part, x = spiking(memory=7, theta=10.0), tokens()
    fire = LIF(LIF.Config(threshold=0.3))
    u, _ = fire(part.write_norm(part.write(x)))
    m, _ = part.memory.step(u[..., 0], part.memory.init_state(2))
    s, _ = fire(part.recall_norm(m))
    h, _ = fire(part.read_norm(part.read(torch.cat([s, x], dim=-1))))
    torch.testing.assert_close(part(x), part.proj(h), rtol=1e-9, atol=1e-9)
    assert 0 < u.mean() < 1
    assert 0 < s.mean() < 1


def test_without_norms_and_recall() -> None:
    part, x = spiking(memory=7, theta=10.0, normed=False, recall=False), tokens()
    assert not any(isinstance(m, nn.BatchNorm1d) for m in part.modules())
    fire = LIF(LIF.Config(threshold=0.3))
    u, _ = fire(part.write(x))
    m = part.memory(u[..., 0])
    h, _ = fire(part.read(torch.cat([m, x], dim=-1)))
    torch.testing.assert_close(part(x), part.proj(h))


def test_masked_tokens_write_nothing() -> None:
    part, x = dense(memory=7, theta=10.0), tokens(12)
    mask = torch.rand(2, 12) > 0.4
    m = part.memory(part.write(x)[..., 0].relu() * mask)
    expected = part.proj(part.read(torch.cat([m, x], dim=-1)).relu())
    torch.testing.assert_close(part(x, Context(mask=mask)), expected)


def test_half_precision_keeps_its_memory_in_single() -> None:
    part = LMU(LMU.Config(memory=16, theta=64.0), Site(dim=8))
    x = torch.randn(2, 100, 8)
    expected = part(x)
    part.bfloat16()
    assert part.memory.transition.dtype is torch.float32
    torch.testing.assert_close(part(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


def test_bad_input() -> None:
    x, part = tokens(), dense()
    with pytest.raises(ValueError, match=r"without proj the output is hidden=3 wide, but 5 is"):
        dense(hidden=3, proj=False)
    with pytest.raises(ValueError, match="memory must be at least 1, got 0"):
        LMU.Config(memory=0)
    with pytest.raises(ValueError, match=r"theta must be at least 1, got 0\.5"):
        LMU.Config(theta=0.5)
    for one in (part, spiking()):
        state = one.init_state(2, like=x)
        with pytest.raises(CapabilityError, match="streaming takes no mask"):
            one.step(x, state, Context(mask=torch.ones(2, 30, dtype=torch.bool)))
    mask = torch.ones(1, 30, dtype=torch.bool)
    with pytest.raises(CapabilityError, match="packing goes with no mask"):
        part(x[:1], Context(mask=mask, packing=Packing.from_mask(mask)))
    with pytest.raises(CapabilityError, match=r"'lmu' needs causal order.*choices: .*softmax"):
        effformer.build_model("dit-nano", attn="lmu")
    with pytest.raises(CapabilityError, match=r"cannot honour a key mask|needs causal order"):
        effformer.build_model("flowformer-series", dim=8, depth=1, heads=1, attn="spiking-lmu")


def test_a_language_model_of_memory_units_streams() -> None:
    model = effformer.build_model(
        "flowformer-gpt-nano", vocab=31, context=24, dim=24, depth=2,
        attn={"name": "lmu", "theta": 8.0},
    ).eval()  # fmt: skip
    ids = torch.randint(0, 31, (2, 12))
    state, outputs = model.init_state(2), []
    for piece in ids.split([5, 1, 6], dim=1):
        out, state = model.step(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), model(ids), rtol=1e-4, atol=1e-5)
