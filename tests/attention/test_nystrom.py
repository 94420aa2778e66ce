"""Nystrom attention."""

from __future__ import annotations

import pytest
import torch
from definitions import HEADS, SITE, assert_counted, each_head, qkv

from effformer.attention import Nystrom, Softmax
from effformer.attention.nystrom import iterative_pinv
from effformer.attention.reference_efficient import nystrom_reference
from effformer.context import Context


@pytest.mark.parametrize("conv", [None, 3])
@pytest.mark.parametrize("n", [3, 4, 12, 13])
def test_equals_the_definition(n: int, conv: int | None) -> None:
    core = Nystrom(Nystrom.Config(landmarks=4, conv=conv), SITE).double()
    inputs, slow = qkv(n), []
    for head in range(HEADS):
        taps = None if conv is None else core.conv.weight[head, 0, :, 0]

        def one(q, k, v, taps=taps):
            return nystrom_reference(q, k, v, landmarks=4, iterations=6, taps=taps)

        slow.append(each_head(one, *(x[:, head : head + 1] for x in inputs)))
    fast, slow = core(*inputs), torch.cat(slow, dim=1)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-11)
    learned = [*inputs, *core.parameters()]
    cotangent = torch.randn_like(fast)
    ours = torch.autograd.grad((fast * cotangent).sum(), learned)
    theirs = torch.autograd.grad((slow * cotangent).sum(), learned)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert_counted(core, n)


@pytest.mark.parametrize("conv", [1, 5, 33, 151])
@pytest.mark.parametrize("n", [64, 65, 150])
def test_filter_in_blocks_is_the_convolution(n: int, conv: int) -> None:
    core, (_, _, v) = Nystrom(Nystrom.Config(conv=conv), SITE).double(), qkv(n)
    torch.testing.assert_close(core._filtered(v, v), v + core.conv(v), rtol=1e-12, atol=1e-12)
    assert_counted(core, n)


def test_as_many_landmarks_as_tokens_is_softmax() -> None:
    inputs = qkv()
    exact = Softmax(Softmax.Config(), SITE)(*inputs)
    core = Nystrom(Nystrom.Config(landmarks=13, conv=None), SITE)
    torch.testing.assert_close(core(*inputs), exact)
    few = Context(mask=torch.arange(13) < torch.tensor([[9], [13]]))  # the general form
    softmax = Softmax(Softmax.Config(), SITE)(*inputs, few)
    torch.testing.assert_close(core(*inputs, few), softmax)


def test_more_steps_approach_the_inverse() -> None:
    x = (torch.eye(6, dtype=torch.float64) * 4 + torch.rand(2, 6, 6).double()).softmax(-1)
    exact = torch.linalg.inv(x)
    one, two, *late = (
        float((iterative_pinv(x, n) - exact).norm() / exact.norm()) for n in (1, 2, 6, 20)
    )
    assert 1e-3 < one < 0.1
    assert two < 1e-2 * one
    assert max(late) < 1e-12  # both have converged: what is left is rounding


def test_published_forms_couple_samples_and_ours_does_not() -> None:
    q, k, v = (x.detach() * 3 for x in qkv(12, batch=3))
    for compat in ("none", "transformers", "nystrom-attention"):
        core = Nystrom(Nystrom.Config(landmarks=4, conv=None, compat=compat), SITE)
        whole = core(q, k, v)[:1]
        alone = core(q[:1], k[:1], v[:1])
        apart = float((whole - alone).abs().max() / whole.abs().max())
        assert apart < 1e-10 if compat == "none" else apart > 1e-4


def test_empty_samples_yield_zeros() -> None:
    core = Nystrom(Nystrom.Config(landmarks=4, conv=None), SITE)
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[0] = True
    out = core(*qkv(), Context(mask=mask))
    assert out.isfinite().all()
    assert not out[1].any()


def test_bad_options_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="no causal form"):
        Nystrom.Config(causal=True)
    with pytest.raises(ValueError, match="conv must be one of 1, 3, 5"):
        Nystrom.Config(conv=4)
    with pytest.raises(ValueError, match="landmarks must be at least 1"):
        Nystrom.Config(landmarks=0)
    core = Nystrom(Nystrom.Config(landmarks=4, compat="transformers"), SITE)
    with pytest.raises(ValueError, match="multiple of 4 tokens, got 13"):
        core.double()(*qkv())
