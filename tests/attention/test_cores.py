"""Fast forms against the slow obvious ones, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from effformer import list_attention
from effformer.attention import Core, Efficient, Flow, Linear, Sana, Softmax
from effformer.attention.flow import FLOW_PRESETS
from effformer.attention.reference import flow_reference, linear_reference, softmax_reference
from effformer.attention.slices import token_slices
from effformer.config import resolve
from effformer.context import Context
from effformer.site import Site

SITE = Site(dim=24, heads=3)


def _qkv(n: int = 13, m: int = 13, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    def draw(length: int) -> Tensor:
        return torch.randn(batch, 3, length, 8, dtype=torch.float64, requires_grad=True)

    return draw(n), draw(m), draw(m)


def _loop(one: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = [[one(q[b, h], k[b, h], v[b, h]) for h in range(q.shape[1])] for b in range(q.shape[0])]
    return torch.stack([torch.stack(r) for r in rows])


def _same_values_and_gradients(core: Core, one: Callable[..., Tensor], m: int = 13) -> None:
    qkv = _qkv(m=m)
    cotangent = torch.randn(2, 3, 13, 8, dtype=torch.float64)
    memory = None if m == 13 else torch.empty(2, m, 24)
    fast, slow = core(*qkv, Context(memory=memory)), _loop(one, *qkv)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad((fast * cotangent).sum(), qkv)
    theirs = torch.autograd.grad((slow * cotangent).sum(), qkv)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("preset", FLOW_PRESETS)
def test_flow_presets_equal_the_definition(preset: str) -> None:
    config = FLOW_PRESETS[preset].replace(chunk=5)
    _same_values_and_gradients(Flow(config, SITE), lambda q, k, v: flow_reference(q, k, v, config))


def test_flow_cross_attention_equals_the_definition() -> None:
    config = Flow.Config()
    _same_values_and_gradients(
        Flow(config, SITE), lambda q, k, v: flow_reference(q, k, v, config), m=7
    )


@pytest.mark.parametrize("causal", [False, True])
def test_linear_equals_the_definition(causal: bool) -> None:
    core = Linear(Linear.Config(causal=causal, chunk=4), SITE)
    _same_values_and_gradients(core, lambda q, k, v: linear_reference(q, k, v, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_softmax_equals_the_definition(causal: bool, backend: str) -> None:
    core = Softmax(Softmax.Config(causal=causal, backend=backend), SITE)
    _same_values_and_gradients(core, lambda q, k, v: softmax_reference(q, k, v, causal=causal))


def _flows(q: Tensor, k: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Conserved flows before the clamp, from the paper's equations."""
    q, k = q.sigmoid() + eps, k.sigmoid() + eps
    incoming = 1 / (q @ k.sum(2, keepdim=True).mT)
    outgoing = 1 / (k @ q.sum(2, keepdim=True).mT)
    into = q @ (k * outgoing).sum(2, keepdim=True).mT
    out_of = k @ (q * incoming).sum(2, keepdim=True).mT
    return into, out_of


def test_flow_is_conserved() -> None:
    q, k, _ = _qkv(19, 13)
    into, out_of = _flows(q, k)
    torch.testing.assert_close(
        out_of.mean(2), torch.full_like(out_of.mean(2), 19 / 13), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        into.mean(2), torch.full_like(into.mean(2), 13 / 19), rtol=1e-4, atol=0
    )


def test_flow_permutations() -> None:
    core = Flow(Flow.Config(), SITE)
    q, k, v = _qkv(11, 7)
    ctx = Context(memory=torch.empty(2, 7, 24))
    out = core(q, k, v, ctx)
    sources, sinks = torch.randperm(7), torch.randperm(11)
    torch.testing.assert_close(core(q, k[:, :, sources], v[:, :, sources], ctx), out)
    torch.testing.assert_close(core(q[:, :, sinks], k, v, ctx), out[:, :, sinks])


def test_flow_causal_and_parallel_agree_on_one_token_only() -> None:
    both, causal = Flow(Flow.Config(), SITE), Flow(Flow.Config(causal=True), SITE)
    one, two = _qkv(1, 1), _qkv(2, 2)
    torch.testing.assert_close(both(*one), causal(*one))
    assert not torch.allclose(both(*two), causal(*two))
    # a single token passes about sigmoid(1) of its value, unlike softmax attention
    torch.testing.assert_close(
        both(*one), one[2] * torch.sigmoid(torch.tensor(1.0)), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    "core", [Flow(Flow.Config(causal=True), SITE), Linear(Linear.Config(causal=True), SITE)]
)
def test_chunk_size_does_not_matter(core: Core) -> None:
    qkv = _qkv(23, 23)
    expected = core(*qkv)
    for chunk in (1, 2, 7, 23, 64):
        other = type(core)(core.config.replace(chunk=chunk), SITE)
        torch.testing.assert_close(other(*qkv), expected)


@pytest.mark.parametrize(
    "core",
    [
        Efficient(Efficient.Config(), SITE),
        Flow(Flow.Config(), SITE),
        Flow(Flow.Config(causal=True, chunk=16), SITE),
        Linear(Linear.Config(), SITE),
        Linear(Linear.Config(causal=True, chunk=16), SITE),
        Sana(Sana.Config(), SITE),
    ],
)
def test_slices_do_not_matter(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = _qkv(150, 150)
    mask = torch.rand(2, 150) < 0.7
    mask[0, :100] = False  # whole slices without a key

    def results() -> tuple[Tensor, ...]:
        out = core(*qkv, Context(mask=mask)) * mask[:, None, :, None]
        return out, *torch.autograd.grad(out.square().sum(), qkv)

    whole = results()
    monkeypatch.setattr("effformer.attention.slices._ELEMENTS", 1)
    torch.testing.assert_close(results(), whole, rtol=1e-9, atol=1e-12)


def test_half_precision_keeps_flows_in_float32() -> None:
    core = Flow(Flow.Config(), SITE)
    q, k, v = (x.detach() for x in _qkv(64, 64))
    exact = core(q, k, v)
    half = core(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=0.05, atol=0.02)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="clamp must be positive"):
        Flow.Config(clamp=-1.0)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        Flow.Config(chunk=0)


def test_slices_grow_with_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice fills the cache of every thread: more threads wait for each other after fewer operators."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = token_slices(4096, 768, device=torch.device("cpu"))
    q, k, v = torch.randn(3, 1, 4, 700, 16).unbind(0)
    core = Flow(Flow.Config(), Site(dim=64, heads=4))
    alone = core(q, k, v)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    four = token_slices(4096, 768, device=torch.device("cpu"))
    assert 3 * len(four) < len(one) <= 4 * len(four)
    assert_close(core(q, k, v), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list_attention(cross=True))
def test_an_empty_memory_gives_what_a_hidden_one_does(name: str) -> None:
    tokens = {"tokens": 4} if name == "linformer" else {}
    part = resolve("attention", {"name": name, **tokens}).build(
        Site(dim=16, heads=2, memory_dim=12)
    )
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 1, 12)
    hidden = Context(memory=memory, memory_mask=torch.zeros(2, 1, dtype=torch.bool))
    assert_close(
        part.eval()(x, Context(memory=memory[:, :0])), part(x, hidden), rtol=1e-5, atol=1e-6
    )
