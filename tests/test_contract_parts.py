"""The contract of every registered part: tested by being registered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from closeness import assert_close
from contract import (
    BLOCKS,
    DIM,
    FFNS,
    HEADS,
    JOINT,
    MIXERS,
    caps_of,
    context_for,
    default_config,
    is_dynamic,
    make_block,
    make_ffn,
    make_mixer,
    mixers,
    mixers_without,
    spikes,
    tokens,
    unrolled,
)
from torch import nn
from torch._dynamo.utils import counters

from effformer import registry
from effformer.checks import CapabilityError
from effformer.config import Config, resolve
from effformer.context import Context, Packing, Rope, Tap

NAMED = (
    [("attention", n) for n in MIXERS] + [("ffn", n) for n in FFNS] + [("block", n) for n in BLOCKS]
)
CONDS = {"never": [False], "optional": [False, True], "always": [True]}
BLOCK_FORMS = [(n, c) for n in BLOCKS for c in CONDS[registry.block.get(n).caps.cond]]


def _parts() -> list[tuple[str, nn.Module]]:
    parts = [(f"attention {n}", make_mixer(n)) for n in MIXERS]
    parts += [(f"ffn {n}", make_ffn(n)) for n in FFNS]
    return parts + [(f"block {n} cond={c}", make_block(n, cond=c)) for n, c in BLOCK_FORMS]


PARTS = _parts()
IDS = [name for name, _ in PARTS]
MODULES = [module for _, module in PARTS]


def _run(part: nn.Module, x: torch.Tensor, **fields: Any) -> torch.Tensor:
    return part(x, context_for(part, x, **fields))


@pytest.mark.parametrize(("kind", "name"), NAMED)
def test_name_dict_and_config_mean_the_same(kind: str, name: str) -> None:
    config = default_config(kind, name)
    assert resolve(kind, {"name": name}) == config
    assert resolve(kind, config) == config
    assert resolve(kind, config.to_dict()) == config


@pytest.mark.parametrize(("kind", "name"), NAMED)
def test_unknown_options_are_refused(kind: str, name: str) -> None:
    with pytest.raises(ValueError, match="unknown option 'no_such_option'"):
        resolve(kind, {"name": name, "no_such_option": 1})


@pytest.mark.parametrize(("kind", "name"), NAMED)
def test_every_entry_says_what_it_is(kind: str, name: str) -> None:
    where = registry.core if kind == "attention" and name in registry.core else registry.KINDS[kind]
    entry = where.get(name)
    assert entry.summary
    assert entry.paper
    assert entry.config is not None
    assert issubclass(entry.config, Config)
    assert "Reference:" in (entry.build.__doc__ or "")


@pytest.mark.parametrize("name", MIXERS)
def test_the_entry_declares_what_the_default_form_can_do(name: str) -> None:
    assert default_config("attention", name).caps() == caps_of(name)


@pytest.mark.parametrize("part", MODULES, ids=IDS)
def test_shape_is_kept_and_every_parameter_learns(part: nn.Module) -> None:
    x = tokens()
    out = _run(part, x)
    assert out.shape == x.shape
    torch.testing.assert_close(_run(part, x), out, rtol=0, atol=0)
    part.zero_grad()
    # gates pass gradients on in training only, where they sample
    out = _run(part.train(is_dynamic(part)), x)
    part.eval()
    (out * torch.randn_like(out)).sum().backward()
    silent = [n for n, p in part.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("part", MODULES, ids=IDS)
def test_samples_do_not_see_each_other(part: nn.Module) -> None:
    torch.manual_seed(3)
    x = tokens(batch=3)
    whole = _run(part, x)
    for i in range(3):
        assert_close(_run(part, x[i : i + 1]), whole[i : i + 1], rtol=1e-4, atol=1e-5)


SMOOTH = [(name, module) for name, module in PARTS if not spikes(module)]


@pytest.mark.parametrize("part", [m for _, m in SMOOTH], ids=[name for name, _ in SMOOTH])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # forward mode
def test_gradients_are_exact(part: nn.Module) -> None:
    part = part.double()
    try:
        x = tokens(5, 1, torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: _run(part, x), (x,), fast_mode=True, check_forward_ad=True
        )
    finally:
        part.float()


@pytest.mark.parametrize("part", MODULES, ids=IDS)
def test_state_dict_round_trip(part: nn.Module) -> None:
    x = tokens()
    before = _run(part, x)
    state = {k: v.clone() for k, v in part.state_dict().items()}
    with torch.no_grad():
        for p in part.parameters():
            p.add_(1.0)
    part.load_state_dict(state)
    torch.testing.assert_close(_run(part, x), before, rtol=0, atol=0)


@pytest.mark.parametrize("part", MODULES, ids=IDS)
def test_compiles_without_graph_breaks(part: nn.Module) -> None:
    """Both directions of these graphs, at many lengths, are compared in the slow tier below."""
    x = tokens()
    ctx = context_for(part, x)
    expected = part(x, ctx)
    torch.compiler.reset()
    compiled = torch.compile(part, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, ctx), expected)


COMPILED = [*PARTS, *((f"causal {n}", make_mixer(n, causal=True)) for n in mixers(causal=True))]
QUICK = ("attention lmu", "attention spiking-lmu", "ffn spiking-conv-channel", "causal linear")
"""Parts with a loop or a block whose length varies, and that are traced in a second."""
MOST_GRAPHS = 3
"""Graphs of `torch.compile(dynamic=True)` over all numbers of tokens above 1, which torch sets apart."""


def _graphs(part: nn.Module, lengths: Sequence[int], backend: str, *, learns: bool) -> int:
    """Compile a part without a break, run it, compare it with itself uncompiled, count graphs: those
    that are kept, for torch calls its backend again wherever it learns that an operator takes no
    number as an input.
    """
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(part, fullgraph=True, dynamic=True, backend=backend)
    core: Any = getattr(part, "core", None)
    fixed = getattr(part, "order", None) is not None  # permutations are constants
    most = part.site.length or getattr(core, "tokens", None) or max(lengths)  # type: ignore[union-attr]
    for n in (11,) if fixed else (n for n in lengths if n <= most):
        x = tokens(n, 2 + n % 2).requires_grad_(learns)
        ctx = context_for(part, x)
        found, expected = compiled(x, ctx), part(x, ctx)
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if learns:
            weights = torch.randn_like(expected)
            grads = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected))
            assert_close(*grads, rtol=1e-4, atol=1e-5)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", QUICK)
def test_few_compiled_graphs_serve_every_length(name: str) -> None:
    assert _graphs(dict(COMPILED)[name], (11, 70, 300), "eager", learns=False) <= MOST_GRAPHS


@pytest.mark.slow
@pytest.mark.parametrize("part", [p for _, p in COMPILED], ids=[name for name, _ in COMPILED])
def test_few_graphs_of_every_part_serve_every_length_and_learn(part: nn.Module) -> None:
    lengths = (3, 7, 16, 33, 64, 150, 300, 301)
    assert _graphs(part, lengths, "aot_eager", learns=True) <= MOST_GRAPHS


@pytest.mark.parametrize("name", mixers(causal=True))
def test_causal_ignores_the_future(name: str) -> None:
    part = make_mixer(name, causal=True)
    x = tokens()
    out = _run(part, x)
    changed = x.clone()
    changed[:, 6:] += torch.randn_like(changed[:, 6:])
    after = _run(part, changed)
    torch.testing.assert_close(after[:, :6], out[:, :6], rtol=0, atol=1e-6)
    assert not torch.allclose(after[:, 6:], out[:, 6:])


@pytest.mark.parametrize("name", mixers(mask="key"))
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(name: str, causal: bool) -> None:
    if causal and not caps_of(name).satisfies(causal=True):
        pytest.skip("the part has no causal form")
    part = make_mixer(name, causal=causal)
    x = tokens(9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, :2] = False
    out = _run(part, x, mask=mask)
    torch.testing.assert_close(out[0, :5], _run(part, x[:1, :5])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[1, 2:], _run(part, x[1:, 2:])[0], rtol=1e-4, atol=1e-5)
    other = torch.where(mask[..., None], x, torch.randn_like(x) * 9)
    again = _run(part, other, mask=mask)
    torch.testing.assert_close(again[mask], out[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", mixers(mask="full"))
def test_full_masks_hold(name: str) -> None:
    part = make_mixer(name)
    x = tokens(6)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    out = _run(part, x, mask=mask)
    changed = x.clone()
    changed[:, 3:] += 1
    torch.testing.assert_close(_run(part, changed, mask=mask)[:, :3], out[:, :3])


@pytest.mark.parametrize("name", mixers(packed=True))
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_looped(name: str, causal: bool) -> None:
    if causal and not caps_of(name).satisfies(causal=True):
        pytest.skip("the part has no causal form")
    part = make_mixer(name, causal=causal)
    x = tokens(7, 6)
    mask = torch.arange(7)[None] < torch.tensor([7, 3, 0, 3, 3, 1])[:, None]
    packing = Packing.from_mask(mask)
    out = packing.unpack(part(packing.pack(x), Context(packing=packing)))
    for i, n in enumerate(packing.lengths):
        assert out[i, n:].abs().sum() == 0
        if n:
            torch.testing.assert_close(
                out[i : i + 1, :n], part(x[i : i + 1, :n]), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("name", mixers(streaming=True))
@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6], [11]])
def test_streaming_equals_the_whole(name: str, pieces: list[int]) -> None:
    # in double precision no spike or choice turns on a rounding error
    part = make_mixer(name, causal=True).double()
    x = tokens(11, dtype=torch.float64)
    state = part.init_state(2, like=x)
    outputs = []
    for piece in x.split(pieces, dim=1):
        out, state = part.step(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), part(x), rtol=1e-4, atol=1e-5)


def _sizes(state: object) -> object:
    if isinstance(state, tuple):
        return [_sizes(each) for each in state]
    return state.shape if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize("name", mixers(streaming=True, cost="n"))
def test_linear_streaming_has_a_state_of_constant_size(name: str) -> None:
    part = make_mixer(name, causal=True)
    x = tokens(8)
    state = part.init_state(2, like=x)
    _, after = part.step(x, state)
    assert _sizes(state) == _sizes(after)


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6], [11]])
@pytest.mark.parametrize("name", registry.ffn.names(streaming=True))
def test_streaming_ffns_equal_the_whole(name: str, pieces: list[int]) -> None:
    part, x, outputs = make_ffn(name).double(), tokens(11, dtype=torch.float64), []
    state = part.init_state(2, like=x)
    for piece in x.split(pieces, dim=1):
        out, state = part.step(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), part(x), rtol=1e-4, atol=1e-5)


CARRYING = [(f"ffn {n}", make_ffn(n)) for n in FFNS if registry.ffn.get(n).caps.causal == "always"]
CARRYING += [
    (f"block {n}", make_block(n, cond=False, attn="lmu"))
    for n in BLOCKS
    if registry.block.get(n).caps.causal == "always"
]


@pytest.mark.parametrize("part", [m for _, m in CARRYING], ids=[name for name, _ in CARRYING])
def test_what_carries_a_state_carries_it_forward_only(part: nn.Module) -> None:
    x = tokens(11)
    changed, out = x.clone(), part(x)
    changed[:, 4] += 3
    after = part(changed)
    torch.testing.assert_close(after[:, :4], out[:, :4], rtol=0, atol=0)
    assert not torch.allclose(after[:, 5:], out[:, 5:])
    with pytest.raises(CapabilityError, match=r"cannot honour mask; choices that can"):
        part(x, Context(mask=torch.ones(2, 11, dtype=torch.bool)))


@pytest.mark.parametrize("name", mixers(cross=True))
def test_cross_attention_takes_another_length(name: str) -> None:
    part = make_mixer(name, memory_dim=10)
    memory = torch.randn(2, 5, 10)
    x = tokens()
    assert part(x, Context(memory=memory)).shape == x.shape
    with pytest.raises(CapabilityError, match="built for cross-attention"):
        part(x)
    with pytest.raises(CapabilityError, match="built for self-attention"):
        make_mixer(name)(x, Context(memory=memory))


@pytest.mark.parametrize("name", mixers(cost="n"))
def test_linear_cost_is_linear(name: str) -> None:
    part = make_mixer(name)
    assert part.macs(2048) <= 2.1 * part.macs(1024)


@pytest.mark.parametrize("name", [n for n in mixers(rope=True) if n != "performer"])
def test_rope_is_relative(name: str) -> None:  # of random features it is the expectation
    part = make_mixer(name)
    angles = torch.randn(4)
    x = tokens(6)

    def turned(start: float) -> torch.Tensor:
        grid = (torch.arange(6) + start)[:, None] * angles
        return _run(part, x, rope=Rope(grid.cos().repeat(1, 2), grid.sin().repeat(1, 2)))

    torch.testing.assert_close(turned(0.0), turned(3.5), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(turned(0.0), _run(part, x))


MASKED = Context(mask=torch.ones(2, 11, dtype=torch.bool))
FULL = Context(mask=torch.ones(2, 1, 11, 11, dtype=torch.bool))
TABLE = torch.ones(11, DIM // HEADS)


@pytest.mark.parametrize(
    ("name", "ctx"),
    [(n, FULL) for n in mixers_without(mask="full")]
    + [(n, MASKED) for n in mixers_without(mask="key")]
    + [(n, Context(rope=Rope(TABLE, TABLE))) for n in mixers_without(rope=True)],
)
def test_undeclared_capabilities_are_refused_with_choices(name: str, ctx: Context) -> None:
    with pytest.raises(CapabilityError, match=r"choices that can: .*softmax"):
        make_mixer(name)(tokens(), ctx)


@pytest.mark.parametrize("name", MIXERS)
def test_packing_and_mask_do_not_mix(name: str) -> None:
    mask = torch.ones(1, 11, dtype=torch.bool)
    part, x = make_mixer(name), tokens(batch=1)
    with pytest.raises(CapabilityError, match=r"pack|mask"):
        part(x, context_for(part, x, mask=mask, packing=Packing.from_mask(mask)))


@pytest.mark.parametrize("name", MIXERS)
def test_taps_read_and_replace(name: str) -> None:
    part = make_mixer(name, path="here")
    if not hasattr(part, "core"):
        pytest.skip("the part has no queries, keys and values")
    x = tokens()
    tap = Tap(keep=("here.v",))
    out = part(x, context_for(part, x, tap=tap))
    torch.testing.assert_close(out, _run(part, x))
    assert tap.seen["here.v"].shape == (2, HEADS, 11, DIM // HEADS)
    zero = Tap(edit=lambda place, value: torch.zeros_like(value), at=("here.v",))
    out = part(x, context_for(part, x, tap=zero))
    bias = torch.zeros(DIM) if part.proj.bias is None else part.proj.bias
    torch.testing.assert_close(out, bias.expand_as(x))


@pytest.mark.parametrize(("name", "cond"), [form for form in BLOCK_FORMS if form[0] not in JOINT])
def test_macs_of_a_block_add_up(name: str, cond: bool) -> None:
    block = make_block(name, cond=cond)
    parts = [b.part.macs(11) for b in block.branches]
    modulation = DIM * 3 * len(parts) * DIM if cond else 0
    own = unrolled(block)
    slots = 0 if own.width is None else own.width.macs()
    slots += 0 if own.tokens is None else own.tokens.macs(11)
    times = getattr(block, "times", 1)  # an iterated block runs its branches several times
    assert block.macs(11) == times * (sum(parts) + modulation + slots)
