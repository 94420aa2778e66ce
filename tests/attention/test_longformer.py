"""Longformer."""

from __future__ import annotations

import pytest
import torch
from definitions import HEADS, SITE

import effformer
from effformer.attention import Attention, Longformer, longformer
from effformer.attention.reference_efficient import longformer_reference
from effformer.checks import CapabilityError
from effformer.context import Context, Packing, Tap


def _part(**options: object) -> Longformer:
    part = Longformer(Longformer.Config(**options), SITE).double()
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return part


def _dense(part: Longformer, x: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    def heads(y: torch.Tensor, parts: int) -> list[torch.Tensor]:
        return list(y.unflatten(-1, (parts, HEADS, -1)).unbind(-3))

    local = heads(part.qkv(x), 3)
    far = local
    if marks.any():
        far = heads(part.q_global(x), 1) + heads(part.kv_global(x), 2)
    samples = []
    for b in range(len(x)):
        one = [
            longformer_reference(
                tuple(y[b, :, h] for y in local), tuple(y[b, :, h] for y in far), marks[b],
                half=part.reach, causal=part.config.causal,
            )
            for h in range(HEADS)
        ]  # fmt: skip
        samples.append(torch.cat(one, dim=1))
    return part.proj(torch.stack(samples))


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "chunk"), [(2, 32), (13, 32), (23, 1), (23, 5), (24, 4)])
def test_equals_the_definition(
    count: int, causal: bool, n: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longformer, "_CHUNK", chunk)
    part = _part(window=6, global_tokens=count, causal=causal)
    x = torch.randn(2, n, 24, dtype=torch.float64, requires_grad=True)
    marks = (torch.arange(n) < count).expand(2, n)
    fast, slow = part(x), _dense(part, x, marks)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-11)
    learned = [x, *part.parameters()]
    cotangent = torch.randn_like(fast)
    ours = torch.autograd.grad((fast * cotangent).sum(), learned)
    theirs = torch.autograd.grad((slow * cotangent).sum(), learned, materialize_grads=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_marks_of_every_sample(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longformer, "_CHUNK", 4)
    part = _part(window=6, marked=True, causal=causal)
    x = torch.randn(3, 23, 24, dtype=torch.float64)
    marks = torch.rand(3, 23) > 0.8
    marks[1] = False
    torch.testing.assert_close(part(x, marks=marks), _dense(part, x, marks))


def test_a_wide_window_is_softmax() -> None:
    part = _part(window=200)
    dense = Attention(Attention.Config(), SITE).double()
    dense.load_state_dict(part.state_dict())
    x = torch.randn(2, 70, 24, dtype=torch.float64)
    mask = torch.arange(70) < torch.tensor([[70], [40]])
    torch.testing.assert_close(part(x), dense(x))
    found, expected = part(x, Context(mask=mask)), dense(x, Context(mask=mask))
    torch.testing.assert_close(found[mask], expected[mask])


def test_the_first_valid_tokens_are_global() -> None:
    part = _part(window=2, global_tokens=2)
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, :5] = False
    mask[1, 1:] = False  # fewer valid tokens than global ones
    out = part(x, Context(mask=mask))
    torch.testing.assert_close(out[:1, 5:], part(x[:1, 5:]))
    torch.testing.assert_close(out[1:, :1], part(x[1:, :1]))


def test_memory_grows_with_tokens_only() -> None:
    part = _part(window=8, global_tokens=1).float()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append(t.numel()) or t, lambda t: t
    ):
        part(torch.randn(1, 4096, 24))
    assert max(seen) < 4096 * 4096 // 8


def test_models_take_it() -> None:
    attn = {"name": "longformer", "window": 8, "global_tokens": 1}
    for name in ("dit-nano", "flowformer-gpt-nano", "bert-tiny"):
        model = effformer.build_model(name, attn=attn).eval()
        model(**model.example_inputs())


def test_bad_options_and_calls_are_refused() -> None:
    for window in (0, 3):
        with pytest.raises(ValueError, match="window must be one of 2, 4, 6"):
            Longformer.Config(window=window)
    with pytest.raises(ValueError, match="either leading or marked"):
        Longformer.Config(marked=True, global_tokens=1)
    with pytest.raises(ValueError, match="global_tokens must be at least 0"):
        Longformer.Config(global_tokens=-1)
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="marks of global tokens go with marked=True"):
        _part()(x, marks=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"marks: expected shape \(B, N\)"):
        _part(marked=True)(x, marks=torch.ones(1, 4, dtype=torch.bool))
    packing = Packing.from_mask(torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(CapabilityError, match="packing goes with neither"):
        _part()(x, Context(packing=packing, tap=Tap()))
    with pytest.raises(ValueError, match="expected one row of 5 tokens"):
        _part()(x.expand(2, -1, -1), Context(packing=packing))
