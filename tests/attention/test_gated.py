"""Layers around the gated recurrence: what they compute, and what holds whatever their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gated_mixers import DIM, HEADS, NAMES, make, obvious, same, tokens, turns
from torch import Tensor

from effformer.attention.gated import Terms
from effformer.attention.reference_gated import gated_reference
from effformer.build import build_model
from effformer.checks import CapabilityError
from effformer.config import resolve
from effformer.context import Context, Packing
from effformer.site import Site

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("retention", {"value_dim": 6}),
    ("gla", {"head_dim": 2, "rank": 3, "slowness": 4.0}),
    ("delta", {"negative": True, "gate": {"per": "element"}}),
    ("gated-delta", {"qk_heads": 2, "value_dim": 3, "short_conv_bias": True}),
    ("gated-delta", {"eps": 0.3, "short_conv": 2, "gate": {"act": "sigmoid", "per": "head"}}),
    ("kda", {"bound": -5.0, "qk_heads": 1}),
    ("ssd", {"qk_heads": 1, "head_dim": 6}),
    ("ssd", {"qk_heads": 2, "gate": {"groups": 2}}),
    ("ssd", {"least": 0.3, "most": 0.6, "gate": {"norm": "head", "first": False}}),
]


def parameters(part: Any) -> list[Tensor]:
    return list(part.parameters())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_layers_equal_the_obvious_form(name: str, options: dict[str, Any]) -> None:
    part, x = make(name, chunk=4, **options), tokens(11).requires_grad_()
    rope = turns(11) if name == "retention" else None
    found, expected = part(x, Context(rope=rope)), obvious(part, x, rope)
    same(found, expected)
    cotangent = torch.randn_like(found)
    grads = [torch.autograd.grad(y, [x, *parameters(part)], cotangent) for y in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        same(ours, theirs, 1e-9)


def test_rotary_tables_turn_keys_of_shared_heads() -> None:
    part, x = make("retention", qk_heads=2), tokens(9)
    same(part(x, Context(rope=turns(9))), obvious(part, x, turns(9)))


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("pieces", [[1] * 11, [2, 1, 8], [6, 5]])
def test_pieces_with_their_states_equal_the_whole(
    name: str, options: dict[str, Any], pieces: list[int]
) -> None:
    part, x = make(name, chunk=4, **options), tokens(11)
    state, outputs = part.init_state(2, like=x), []
    for piece in x.split(pieces, dim=1):
        out, state = part.step(piece, state)
        outputs.append(out)
    same(torch.cat(outputs, dim=1), part(x))


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_have_no_influence_at_all(name: str) -> None:
    part, x = make(name, chunk=4), tokens(11).requires_grad_()
    (grad,) = torch.autograd.grad(part(x)[:, :6].square().sum(), x)
    assert not grad[:, 6:].any()
    assert grad[:, :6].any(dim=-1).all()


FORMS = {
    "causal": {}, "both": {"causal": False}, "alternate": {"causal": False, "direction": "alternate"},
    "both-exclusive": {"causal": False, "direction": "both-exclusive"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side_is_as_if_it_were_not_there(name: str, form: str) -> None:
    part = make(name, chunk=4, **{"short_conv_bias": True, **FORMS[form]})
    x, filled = tokens(7), 100 * torch.randn(2, 4, DIM, dtype=torch.float64)
    expected = part(x)
    for before in (0, 1, 4):
        mask = torch.zeros(2, 11, dtype=torch.bool)
        mask[:, before : before + 7] = True
        padded = torch.cat([filled[:, :before], x, filled[:, before:]], dim=1)
        same(part(padded, Context(mask=mask))[mask].view(2, 7, DIM), expected)


def test_padding_writes_nothing_where_a_rule_has_no_gate() -> None:
    part = make("delta", causal=False, short_conv=0)
    part.core.terms = lambda q, k, v, beta: Terms(part.core.unit(q), part.core.unit(k), v)
    x, real = tokens(7), torch.tensor([0, 1, 2, 5, 6])
    mask = torch.isin(torch.arange(7), real).expand(2, -1)
    same(part(x, Context(mask=mask))[:, real], part(x[:, real]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "n"), [(0, 0), (0, 2), (0, 7), (2, 0)])
def test_nothing_given_is_answered_with_nothing(name: str, form: str, batch: int, n: int) -> None:
    x = torch.empty(batch, n, DIM, dtype=torch.float64)
    assert make(name, **FORMS[form])(x).shape == x.shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_do_not_meet(name: str, form: str) -> None:
    part, x = make(name, chunk=4, **FORMS[form]), tokens(9, batch=3)
    mask = torch.arange(9) < torch.tensor([9, 2, 5])[:, None]
    packed = part(x[mask][None], Context(packing=Packing.from_mask(mask)))
    alone = [part(x[i : i + 1, : int(mask[i].sum())])[0] for i in range(3)]
    same(packed[0], torch.cat(alone))


def inner(name: str, **options: Any) -> tuple[Any, Callable[..., Tensor]]:
    """The core of a layer, and its causal form with the same weights."""
    part, causal = make(name, causal=False, **options), make(name)
    causal.load_state_dict(part.state_dict())
    return part, causal.core


def given(part: Any, n: int) -> dict[str, Tensor]:
    """Random inputs of the core."""
    config, generator = part.core.config, torch.Generator().manual_seed(4)
    widths = {n: i.width for n, i in config.inputs(part.head_dim, part.value_dim).items()}
    widths = dict.fromkeys("qkv", part.head_dim) | widths
    return {
        name: torch.randn(2, HEADS, n, width, dtype=torch.float64, generator=generator)
        for name, width in widths.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_both_directions_are_a_scan_and_a_scan_turned_round(name: str) -> None:
    part, causal = inner(name, chunk=4)
    ins = given(part, 9)
    back = causal(**{n: x.flip(2) for n, x in ins.items()}).flip(2)
    expected = causal(**ins) + back
    if name == "ssd":  # what goes on as it is goes on once
        expected = expected - part.core.skip[:, None, None] * ins["v"]
    same(part.core(**ins), expected)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("name", NAMES)
def test_exclusive_directions_meet_the_token_itself_once(name: str, n: int) -> None:
    """Backward, a query reads what the tokens behind its own have left, each of its queries alone."""
    part, causal = inner(name, chunk=4, direction="both-exclusive")
    ins = {key: x.requires_grad_() for key, x in given(part, n).items()}
    terms = causal.terms(**ins)
    rows = [torch.zeros_like(ins["v"][:, :, :1])]
    for t in range(n - 2, -1, -1):
        q, *rest = (x if x is None or x.dim() == 1 else x[:, :, t + 1 :].flip(2) for x in terms)
        asked = terms.q[:, :, t : t + 1].expand_as(q)
        out, _ = gated_reference(asked, *rest, delta=causal.DELTA, scale=causal.scale)
        rows.append(out[:, :, -1:])
    expected = causal(**ins) + torch.cat(rows[::-1], dim=2)
    found, leaves = part.core(**ins), [*ins.values()]
    same(found, expected)
    cotangent = torch.randn_like(found)
    grads = [torch.autograd.grad(y, leaves, cotangent) for y in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        same(ours, theirs, 1e-9)


def test_exclusive_directions_that_forget_nothing_sum_every_token_once() -> None:
    part, _ = inner("gla", direction="both-exclusive")
    ins = given(part, 9) | {"decay": torch.full((2, HEADS, 9, 4), 1e3, dtype=torch.float64)}
    same(part.core(**ins), (ins["q"] @ ins["k"].mT / 2) @ ins["v"])


@pytest.mark.parametrize("name", NAMES)
def test_both_directions_have_no_direction(name: str) -> None:
    part, x = make(name, causal=False), tokens(9)
    same(part(x.flip(1)), part(x).flip(1))


@pytest.mark.parametrize("name", ["gated-delta", "retention"])
@pytest.mark.parametrize(("layer", "order"), [
    (0, [0, 1, 2, 3, 4, 5, 6]), (1, [6, 5, 4, 3, 2, 1, 0]),
    (2, [0, 1, 4, 2, 5, 3, 6]), (3, [6, 3, 5, 2, 4, 1, 0]), (4, [0, 1, 2, 3, 4, 5, 6]),
])  # fmt: skip
def test_four_layers_read_a_grid_in_four_directions(
    name: str, layer: int, order: list[int]
) -> None:
    """One token in front of a grid of two rows and three columns."""
    part, causal = inner(name, layer=layer, direction="alternate")
    ins = given(part, 7)
    found = part.core(**ins, ctx=Context(grid=(2, 3)))
    same(found[:, :, order], causal(**{n: x[:, :, order] for n, x in ins.items()}))
    text = part.core(**ins)
    expected = (
        causal(**{n: x.flip(2) for n, x in ins.items()}).flip(2) if layer % 2 else causal(**ins)
    )
    same(text, expected)


def test_equal_channels_of_kda_are_the_gated_delta_rule() -> None:
    part, whole = make("gated-delta"), make("kda")
    ins = given(part, 9)
    with torch.no_grad():
        whole.core.rate.copy_(part.core.rate)
        whole.core.bias.copy_(part.core.bias[:, None].expand_as(whole.core.bias))
    wide = ins | {"decay": ins["decay"].expand_as(ins["k"])}
    same(whole.core(**wide), part.core(**ins))


def test_ssd_is_gated_linear_attention_of_one_decay() -> None:
    part, gla = make("ssd"), make("gla", slowness=1.0)
    ins = given(part, 9)
    time = ins.pop("time")
    d = torch.nn.functional.softplus(time + part.core.bias[:, None, None])
    decay = (-part.core.rate.exp()[:, None, None] * d).exp()
    logits = (decay / (1 - decay)).log().expand_as(ins["k"])
    width = DIM // HEADS
    expected = gla.core(ins["q"] * width**0.5, ins["k"], ins["v"] * d, decay=logits)
    expected = expected + part.core.skip[:, None, None] * ins["v"]
    same(part.core(**ins, time=time), expected)


def test_gated_linear_attention_that_forgets_nothing_sums() -> None:
    part = make("gla")
    ins = given(part, 9) | {"decay": torch.full((2, HEADS, 9, 4), 1e3, dtype=torch.float64)}
    scores = (ins["q"] @ ins["k"].mT / 2).tril()
    same(part.core(**ins), scores @ ins["v"])


def test_the_delta_rule_overwrites() -> None:
    """b = 1 and orthonormal keys: asked for any key it has seen, the memory gives the last value."""
    part = make("delta", eps=0.0)
    keys = torch.eye(4, dtype=torch.float64).repeat(3, 1)[None, None].expand(2, HEADS, 12, 4)
    v = torch.randn(2, HEADS, 12, 4, dtype=torch.float64)
    beta = torch.full((2, HEADS, 12, 1), 1e3, dtype=torch.float64)
    same(part.core(keys, keys, v, beta=beta) * 2, v)
    asked = keys.roll(1, dims=2)
    same((part.core(asked, keys, v, beta=beta) * 2)[:, :, 1:], v[:, :, :-1])


CUTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES if name != "ssd"),
    ("gated-delta", {"gate": {"per": "head"}}), ("kda", {"gate": {"rank": 2}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CUTS)
def test_a_layer_of_some_heads_is_the_layer_with_the_others_at_nothing(
    name: str, options: dict[str, Any]
) -> None:
    part, x = make(name, **options), tokens(9)
    small = part.select(torch.tensor([0, 3]))
    width = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64).expand(2, -1)
    same(small(x), part(x, Context(width=width)))


def test_heads_of_one_query_are_cut_together() -> None:
    part, x = make("gated-delta", qk_heads=2), tokens(9)
    small = part.select(torch.tensor([2, 3]))
    assert (small.q_heads, small.k_heads, small.v_heads, part.bundle) == (1, 1, 2, 2)
    width = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64).expand(2, -1)
    same(small(x), part(x, Context(width=width)))


@pytest.mark.parametrize("options", [{"qk_heads": 2}, {"gate": {"norm": "groups"}}])
def test_heads_that_share_cannot_be_taken_apart(options: dict[str, Any]) -> None:
    with pytest.raises(CapabilityError, match=r"cannot be cut to some heads|only be cut together"):
        make("gated-delta", **options).select(torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_half_precision_keeps_state_and_gates_in_float32(name: str, dtype: torch.dtype) -> None:
    part, exact = make(name, gate=None).to(dtype), make(name, gate=None)
    exact.load_state_dict(part.state_dict())
    x = tokens(150).to(dtype)
    found, expected = part(x), exact(x.double())
    assert found.dtype == dtype
    # without the norm of the outputs, which makes much of small ones: a few roundings of whole
    # tensors, and none that grows with the tokens
    error = (found.double() - expected).abs().amax(dim=(0, 2)) / expected.abs().max()
    assert float(error.max()) < 4 * torch.finfo(dtype).eps
    out, state = part.step(x, part.init_state(2, like=x))
    assert (out.dtype, state.core.dtype) == (dtype, torch.float32)
    if state.conv is not None:
        assert state.conv.dtype == dtype
    terms = part.core.terms(**{n: y.to(dtype) for n, y in given(part, 5).items()})
    assert {y.dtype for y in (terms.decay, terms.beta) if y is not None} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_near_float32(name: str) -> None:
    """Without the norm of the outputs, which makes much of the rounding of small ones."""
    part, x = make(name, gate=None).float(), tokens(40).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = part(x)
        assert make(name).float()(x).dtype == torch.bfloat16
    same(found.float(), part(x), 12 * torch.finfo(torch.bfloat16).eps)


def test_strong_decays_have_finite_gradients() -> None:
    part, x = make("kda"), tokens(40).requires_grad_()
    with torch.no_grad():
        part.core.rate.fill_(3.0)
    grads = torch.autograd.grad(part(x).square().sum(), [x, *parameters(part)])
    assert all(g.isfinite().all() for g in grads)


@torch.no_grad()
def test_rates_begin_as_published() -> None:
    site = Site(dim=64, heads=64)
    core = resolve("attention", "gated-delta").build(site).core
    assert float(core.rate.exp().max()) <= 16
    time = torch.nn.functional.softplus(core.bias)
    assert float(time.min()) >= 0.00099
    assert float(time.max()) <= 0.1001
    assert float(time.max() / time.min()) > 5


@pytest.mark.parametrize(("name", "options", "message"), [
    ("gla", {"rank": 0}, "rank must be at least 1"),
    ("kda", {"bound": 0.0}, "bound must be below 0"),
    ("retention", {"chunk": 0}, "chunk must be at least 1"),
    ("ssd", {"least": 1.0, "most": 0.5}, "least=1.0 is not below most=0.5"),
    ("gla", {"gate": {"rank": 0}}, "rank must be at least 1"),
    ("gated-delta", {"short_conv": 1}, "conv"),
])  # fmt: skip
def test_impossible_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_a_convolution_wants_one_sequence_in_its_order() -> None:
    """Around any core: no full masks, no two streams that meet, no merged tokens."""
    part, x = make("softmax", short_conv=3), tokens(7)
    assert (part.caps.mask, part.caps.order_free, part.caps.sizes) == ("key", False, False)
    same(part(x)[:, :4], part(x[:, :4]))
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    with pytest.raises(CapabilityError, match="mask"):
        part(x, Context(mask=mask))
    with pytest.raises(CapabilityError, match="softmax"):
        build_model("vit-nano", tokens="tome", attn={"name": "softmax", "short_conv": 3})


def test_a_convolution_and_a_memory_are_refused() -> None:
    config = resolve("attention", "gated-delta")
    with pytest.raises(CapabilityError, match="conv"):
        config.build(replace(Site(dim=DIM, heads=HEADS), memory_dim=8))
