from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from effformer.attention import gated_scan as module
from effformer.attention.gated_scan import gated_scan, gated_scan_macs, retention_decay
from effformer.attention.reference_gated import gated_reference
from effformer.attention.scan import causal_product
from effformer.profile import Counter

RULES = {
    "retention": ("constant", False),
    "simple-gla": ("token", False),
    "gla": ("channel", False),
    "delta": ("none", True),
    "gated-delta": ("token", True),
    "kda": ("channel", True),
}
"""Rule -> kind of decay, delta."""


class Inputs:
    """Random arguments of `gated_scan` for a rule; keys are of unit length."""

    def __init__(
        self, rule: str, tokens: int, *, batch: int = 1, heads: int = 2, values: int = 2,
        width: int = 4, dtype: torch.dtype = torch.float64, beta: bool | None = None,
    ) -> None:  # fmt: skip
        decay, self.delta = RULES[rule]
        sizes = (batch, values, tokens)
        g = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=dtype)

        self.q = normal(batch, heads, tokens, width)
        self.k = F.normalize(normal(batch, heads, tokens, width), dim=-1)
        self.v = normal(*sizes, 3)
        decays = {
            "constant": retention_decay(values).to(dtype), "none": None,
            "token": -3 * normal(*sizes).abs(), "channel": -3 * normal(*sizes, width).abs(),
        }  # fmt: skip
        self.decay = decays[decay]
        use_beta = self.delta if beta is None else beta
        self.beta = normal(*sizes).sigmoid() if use_beta else None
        self.state = normal(batch, values, width, 3)

    def given(self) -> dict[str, Tensor]:
        named = {n: getattr(self, n) for n in ("q", "k", "v", "decay", "beta", "state")}
        return {n: x.requires_grad_() for n, x in named.items() if x is not None}

    def run(self, **options: Any) -> tuple[Tensor, Tensor]:
        state = options.pop("state", self.state)
        return gated_scan(
            self.q, self.k, self.v, self.decay, self.beta, state, delta=self.delta, **options
        )

    def piece(self, rows: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        decay = self.decay
        if decay is not None and decay.dim() > 1:
            decay = decay[:, :, rows]
        beta = None if self.beta is None else self.beta[:, :, rows]
        q, k, v = (x[:, :, rows] for x in (self.q, self.k, self.v))
        return gated_scan(q, k, v, decay, beta, state, delta=self.delta, chunk=8)

    def reference(self) -> tuple[Tensor, Tensor]:
        return gated_reference(
            self.q, self.k, self.v, self.decay, self.beta, self.state, delta=self.delta
        )


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    """Relative to the largest value."""
    actual, expected = actual.detach(), expected.detach()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.to(expected.dtype), expected, rtol=tolerance, atol=tolerance * scale
    )


def assert_same_with_gradients(
    given: Mapping[str, Tensor], actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]
) -> None:
    cotangents = [torch.randn_like(x) for x in expected]
    grads = []
    for found in (actual, expected):
        value = sum((x * c).sum() for x, c in zip(found, cotangents, strict=True))
        assert isinstance(value, Tensor)
        grads.append(torch.autograd.grad(value, list(given.values())))
    for a, e in zip((*actual, *grads[0]), (*expected, *grads[1]), strict=True):
        assert_same(a, e)


@pytest.fixture
def chunks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token alone goes through a chunk, too."""
    monkeypatch.setattr(module, "_FEW", -1)


@pytest.mark.parametrize(("chunk", "tokens"), [
    (1, 1), (1, 2), (5, 1), (5, 5), (5, 6), (16, 16), (16, 17), (16, 40), (64, 1), (64, 64), (64, 65),
])  # fmt: skip
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("chunks_only")
def test_chunks_equal_the_loop(rule: str, chunk: int, tokens: int) -> None:
    inputs = Inputs(rule, tokens)
    given = inputs.given()
    assert_same_with_gradients(given, inputs.run(chunk=chunk), inputs.reference())


@pytest.mark.parametrize("rule", RULES)
def test_a_few_tokens_equal_the_loop(rule: str) -> None:
    inputs = Inputs(rule, 3, batch=2, values=4)
    assert_same_with_gradients(inputs.given(), inputs.run(), inputs.reference())


@pytest.mark.parametrize("rule", ["simple-gla", "gated-delta", "kda"])
def test_value_heads_share_queries_and_keys(rule: str) -> None:
    inputs = Inputs(rule, 21, batch=2, heads=2, values=6)
    given = inputs.given()
    assert_same_with_gradients(given, inputs.run(chunk=8), inputs.reference())
    alone = gated_scan(
        inputs.q[:, 1:], inputs.k[:, 1:], inputs.v[:, 3:4],
        None if inputs.decay is None else inputs.decay[:, 3:4],
        None if inputs.beta is None else inputs.beta[:, 3:4],
        inputs.state[:, 3:4], delta=inputs.delta,
    )  # fmt: skip
    assert_same(inputs.run()[0][:, 3:4], alone[0])


@pytest.mark.parametrize("rule", RULES)
def test_pieces_with_their_state_equal_the_whole(rule: str) -> None:
    inputs = Inputs(rule, 40, batch=2)
    state: Tensor | None = inputs.state
    outputs = []
    for start, stop in ((0, 1), (1, 4), (4, 4), (4, 20), (20, 40)):
        out, state = inputs.piece(slice(start, stop), state)
        outputs.append(out)
    assert state is not None
    out, last = inputs.run(chunk=16)
    assert_same(torch.cat(outputs, dim=2), out)
    assert_same(state, last)


@pytest.mark.parametrize("rule", RULES)
def test_slices_that_stay_in_cache_change_nothing(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs(rule, 70)
    given, whole = inputs.given(), inputs.run(chunk=8)
    monkeypatch.setattr("effformer.attention.slices._ELEMENTS", 1)
    assert_same_with_gradients(given, inputs.run(chunk=8), whole)


@pytest.mark.parametrize("rule", RULES)
def test_later_tokens_do_not_matter_at_all(rule: str) -> None:
    inputs, seen = Inputs(rule, 40), 19
    given = inputs.given()
    out, _ = inputs.run(chunk=16)
    grads = torch.autograd.grad(out[:, :, :seen].sum(), list(given.values()))
    for name, grad in zip(given, grads, strict=True):
        if grad.dim() > 2 and name != "state":
            assert (grad[:, :, seen:] == 0).all(), name
            assert (grad[:, :, :seen] != 0).any(), name


@pytest.mark.parametrize("tokens", [0, 3, 37])
@pytest.mark.parametrize("rule", RULES)
def test_an_empty_batch_has_an_empty_answer(rule: str, tokens: int) -> None:
    inputs = Inputs(rule, tokens, batch=0)
    given = inputs.given()
    out, state = inputs.run()
    assert (out.shape, state.shape) == ((0, 2, tokens, 3), (0, 2, 4, 3))
    if tokens:
        grads = torch.autograd.grad(out.sum() + state.sum(), list(given.values()))
        assert [x.shape for x in grads] == [x.shape for x in given.values()]


@pytest.mark.parametrize("rule", ["delta", "gated-delta", "kda"])
def test_the_delta_rule_may_write_in_full(rule: str) -> None:
    inputs = Inputs(rule, 21, beta=False)
    assert_same_with_gradients(inputs.given(), inputs.run(chunk=8), inputs.reference())


def test_orthonormal_keys_overwrite() -> None:
    width = 8
    k = torch.eye(width, dtype=torch.float64)[None, None]
    v, old = torch.randn(2, 1, 1, width, 3, dtype=torch.float64).unbind(0)
    q = torch.zeros_like(k)
    _, state = gated_scan(q, k, old, None, delta=True)
    _, state = gated_scan(q, k, v, None, state=state, delta=True)
    assert_same(k @ state, v)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("tokens", [3, 37])
def test_decay_without_end_leaves_the_token_alone(channels: bool, delta: bool, tokens: int) -> None:
    inputs = Inputs("kda" if channels else "gated-delta", tokens)
    assert inputs.beta is not None
    decay = torch.full_like(inputs.decay, -torch.inf)  # type: ignore[arg-type]
    q, k, v, g, b, s = (
        x.detach().requires_grad_()
        for x in (inputs.q, inputs.k, inputs.v, decay, inputs.beta, inputs.state)
    )
    out, state = gated_scan(q, k, v, g, b, s, delta=delta, chunk=16)
    expected = 0.5 * (q * k).sum(-1, keepdim=True) * b.unsqueeze(-1) * v
    assert_same(out, expected)
    grads = torch.autograd.grad(out.square().sum() + state.sum(), (q, k, v, g, b, s))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("rule", ["simple-gla", "gla", "gated-delta", "kda"])
@pytest.mark.parametrize("strength", [20.0, 200.0])
def test_strong_decays_have_finite_gradients(rule: str, strength: float) -> None:
    inputs = Inputs(rule, 70, dtype=torch.float32)
    assert inputs.decay is not None
    inputs.decay = torch.where(inputs.decay < -2, -strength, inputs.decay)
    given = inputs.given()
    out, state = inputs.run()
    grads = torch.autograd.grad(out.square().sum() + state.sum(), list(given.values()))
    assert all(grad.isfinite().all() for grad in grads)
    assert_same(out.double(), inputs.reference()[0], 1e-5)


def test_equal_channels_are_one_decay() -> None:
    inputs = Inputs("gated-delta", 40)
    assert inputs.decay is not None
    for delta in (True, False):
        args = (inputs.q, inputs.k, inputs.v)
        rest = {"beta": inputs.beta, "state": inputs.state, "delta": delta}
        wide = inputs.decay.unsqueeze(-1).expand(*inputs.decay.shape, 4)
        one, many = gated_scan(*args, inputs.decay, **rest), gated_scan(*args, wide, **rest)
        assert_same(many[0], one[0])
        assert_same(many[1], one[1])


def test_no_decay_and_no_delta_is_linear_attention() -> None:
    inputs = Inputs("gla", 40)
    zero = torch.zeros_like(inputs.decay)  # type: ignore[arg-type]
    expected = causal_product(inputs.q, inputs.k, inputs.v, inputs.state, chunk=8)
    for decay in (zero, zero[..., 0], None):
        out, state = gated_scan(
            inputs.q, inputs.k, inputs.v, decay, state=inputs.state, delta=False, scale=1.0
        )
        assert_same(out, expected[0])
        assert_same(state, expected[1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("chunks_only")
def test_gradcheck(rule: str) -> None:
    inputs = Inputs(rule, 5, heads=1, values=2, width=3)
    given = inputs.given()

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(given, values, strict=True))
        return gated_scan(
            named["q"], named["k"], named["v"], named.get("decay"), named.get("beta"),
            named["state"], delta=inputs.delta, chunk=4,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(given.values()))


@pytest.mark.parametrize("rule", ["retention", "gated-delta", "kda"])
def test_half_precision_keeps_its_sums_in_float32(rule: str) -> None:
    inputs = Inputs(rule, 70, dtype=torch.bfloat16)
    out, state = inputs.run(state=None)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    inputs.state = torch.zeros_like(inputs.state)
    expected = inputs.reference()
    assert_same(out, expected[0], 4e-3)
    assert_same(state, expected[1], 1e-5)


def test_autocast_leaves_it_alone() -> None:
    inputs = Inputs("kda", 40, dtype=torch.float32)
    plain = inputs.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = inputs.run()
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [3, 16, 37])
def test_macs_are_those_of_the_operators(rule: str, tokens: int) -> None:
    inputs = Inputs(rule, tokens, dtype=torch.float32)
    with Counter(nn.Identity()) as counter:
        inputs.run(chunk=16)
    kind, delta = RULES[rule]
    sizes = {"heads": 2, "key_dim": 4, "value_dim": 3}
    expected = gated_scan_macs(tokens, 16, **sizes, delta=delta, per_channel=kind == "channel")
    assert counter.total == expected
    assert not [name for (_, name), row in counter.rows.items() if row.kind == "unknown"]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator makes."""

    size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("rule", RULES)
def test_cost_is_linear_in_tokens(rule: str) -> None:
    found, n = [], 256
    for tokens in (n, 2 * n):
        inputs = Inputs(rule, tokens, dtype=torch.float32)
        given = inputs.given()
        with Counter(nn.Identity()) as counter, Largest() as largest:
            out, _ = inputs.run(chunk=16)
            torch.autograd.grad(out.sum(), [x for n, x in given.items() if n != "state"])
        found.append((counter.total, largest.size))
    assert found[1][0] <= 2.1 * found[0][0]
    assert found[1][1] <= 2.5 * found[0][1]
    assert found[1][1] < (2 * n) ** 2


@pytest.mark.parametrize(("change", "message"), [
    ({"k": torch.zeros(1, 2, 5, 3)}, r"k \(B, H, N, K\), as q"),
    ({"v": torch.zeros(1, 3, 5, 3)}, "3 value heads are no multiple of 2 heads"),
    ({"v": torch.zeros(1, 2, 6, 3)}, r"v \(B, Hv, N, V\)"),
    ({"decay": torch.zeros(3)}, r"decay \(Hv,\), \(B, Hv, N\) or"),
    ({"decay": torch.zeros(1, 2, 5, 3)}, r"decay \(Hv,\), \(B, Hv, N\) or"),
    ({"beta": torch.zeros(1, 2, 5, 4)}, r"beta \(B, Hv, N\)"),
    ({"state": torch.zeros(1, 2, 3, 4)}, r"state \(B, Hv, K, V\)"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    q = torch.zeros(1, 2, 5, 4)
    given = {"q": q, "k": q, "v": torch.zeros(1, 2, 5, 3), "decay": None} | change
    with pytest.raises(ValueError, match=message):
        gated_scan(**given, delta=True)  # type: ignore[arg-type]
