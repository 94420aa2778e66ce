"""Long sequences and streams of every registered part in half precision and under autocast, against
float64; large values are in the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from contract import (
    BLOCKS,
    FFNS,
    MIXERS,
    OPTIONS,
    caps_of,
    context_for,
    make_block,
    make_ffn,
    make_mixer,
    mixers,
    tokens,
)
from torch import Tensor, nn

from effformer import registry
from effformer.nn.precision import exactly, running_mean, widened
from effformer.testing.precision import KINDS, assert_near, lowered, passed, rounded

# a norm of half inputs and float32 weights, as autocast leaves them, has no fused form on a CPU
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
FORMS = [(n, c) for n in MIXERS for c in (False, True) if caps_of(n).satisfies(causal=c)]
STREAMING = [("attention", n) for n in mixers(streaming=True)]
STREAMING += [("ffn", n) for n in registry.ffn.names(streaming=True)]
NEED_LENGTH = ("linformer", "tdsm")
LONG = (nn.LayerNorm,)
"""On a CPU torch sums the gradients of its factors in the type of the input: wrong by a half in
bfloat16 at 2,048 tokens."""


def _mixer(name: str, causal: bool, n: int) -> nn.Module:
    options = {"tokens": n} if name in NEED_LENGTH else {}
    return make_mixer(name, causal=causal, options={**OPTIONS.get(name, {}), **options})


def _parts(n: int) -> list[tuple[str, Callable[[], nn.Module]]]:
    parts: list[tuple[str, Callable[[], nn.Module]]] = [
        (f"attention {name}{' causal' if c else ''}", lambda name=name, c=c: _mixer(name, c, n))
        for name, c in FORMS
    ]
    parts += [(f"ffn {name}", lambda name=name: make_ffn(name)) for name in FFNS]
    parts += [
        (f"block {name}", lambda name=name: make_block(name, cond=_conditioned(name)))
        for name in BLOCKS
    ]
    return parts


def _conditioned(name: str) -> bool:
    return registry.block.get(name).caps.cond != "never"


def _call(part: nn.Module, x: Tensor) -> Tensor:
    return part(x, context_for(part, x))


PARTS = dict(_parts(11))


@pytest.mark.parametrize("name", mixers(cost="n", causal=False))
def test_sums_over_many_tokens(name: str) -> None:
    part = _mixer(name, False, 1024)
    assert_near(part, tokens(1024, 1), "float16", _call, backward=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize(
    ("n", "name"),
    [(1024, name) for name in PARTS]
    + [
        (4096, name)
        for name in PARTS
        if name.removesuffix(" causal").split()[1] in mixers(cost="n")
    ],
)
def test_long_sequences(name: str, n: int, scale: float, kind: str) -> None:
    assert_near(dict(_parts(n))[name](), tokens(n, 1) * scale, kind, _call, skip=LONG)


def _made(kind: str, name: str) -> nn.Module:
    return make_mixer(name, causal=True) if kind == "attention" else make_ffn(name)


def _stream(part: nn.Module, x: Tensor, autocast: torch.dtype | None) -> tuple[Tensor, Any]:
    outputs, state = [], part.init_state(x.shape[0], like=x)
    with torch.no_grad(), torch.autocast("cpu", autocast) if autocast else nullcontext():
        for token in x.split(1, dim=1):
            out, state = part.step(token, state)
            outputs.append(out)
    return torch.cat(outputs, dim=1), state


def _streams_exactly(kind: str, name: str, precision: str, n: int) -> None:
    low, x, exact = lowered(_made(kind, name), tokens(n, 1) * 3, precision)
    dtype, autocast = KINDS[precision]
    eps = torch.finfo(autocast or dtype).eps
    with torch.no_grad():
        expected = passed(exact, x.double(), _call, None, None).out
        nearby = passed(*rounded(exact, x.double(), eps, 0), _call, None, None).out
    last = (slice(None), slice(-50, None))
    size, change = expected[last].norm(), (nearby - expected)[last].norm()
    error = (_stream(low, x, autocast)[0].double() - expected)[last].norm()
    assert error <= 8 * max(change, eps * size / 4)


@pytest.mark.parametrize("precision", ["bfloat16", "autocast-float16"])
@pytest.mark.parametrize(("kind", "name"), STREAMING)
def test_streams_keep_their_sums(kind: str, name: str, precision: str) -> None:
    _streams_exactly(kind, name, precision, 24)


@pytest.mark.slow
@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize(("kind", "name"), STREAMING)
def test_long_streams_keep_their_sums(kind: str, name: str, precision: str) -> None:
    _streams_exactly(kind, name, precision, 1500)


def _leaves(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for each in state:
            yield from _leaves(each)


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("name", mixers(streaming=True, cost="n"))
def test_states_are_no_sums_in_half_precision(name: str, precision: str) -> None:
    low, x, _ = lowered(make_mixer(name, causal=True), tokens(3, 1), precision)
    _, state = _stream(low, x, KINDS[precision][1])
    own = getattr(state, "core", state)  # beside it stand inputs of a convolution
    assert {leaf.dtype for leaf in _leaves(own)} == {torch.float32}


class _Sums(nn.Module):
    """Means up to every token, in ways that are right or wrong."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.proj = way, nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x).abs()
        n = h.shape[1]
        lower = torch.ones(n, n, dtype=h.dtype, device=h.device).tril()
        if self.way == "right":
            return running_mean(h)[0]
        if self.way == "guarded":
            with exactly(h):
                return (widened(lower) @ widened(h) / n).to(h.dtype)
        if self.way == "autocast":
            return widened(lower) @ (widened(h) * 1000) / (1000 * n)
        if self.way in ("overflow", "underflow"):
            factor = 1e4 if self.way == "overflow" else 1e-8
            return h * factor / factor
        total, rows = torch.zeros_like(h[:, 0]), []
        for token in h.unbind(1):
            total = total + token
            rows.append(total / n)
        return torch.stack(rows, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["right", "guarded"])
def test_the_bound_lets_exact_sums_pass(way: str, kind: str) -> None:
    assert_near(_Sums(way), tokens(512, 1), kind, lambda part, x: part(x))


@pytest.mark.parametrize(
    ("way", "kind"),
    [("running", "bfloat16"), ("autocast", "autocast-float16"), ("overflow", "float16"),
     ("underflow", "float16")],
)  # fmt: skip
def test_the_bound_finds_what_was_wrong(way: str, kind: str) -> None:
    with pytest.raises(AssertionError, match=r"off by|not finite"):
        assert_near(_Sums(way), tokens(512, 1) * 10, kind, lambda part, x: part(x))
