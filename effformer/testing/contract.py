"""The contract of token mixers, FFNs and blocks: what holds for every part, and what each capability
promises.

A check reads like a sentence: the function's name says what holds, and its failure what does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effformer.checks import CapabilityError
from effformer.config import Config, resolve
from effformer.context import Context, Packing, Rope, Tap

from .closeness import assert_close
from .report import Check, demand
from .subjects import DIM, HEADS, Subject, context_for, is_dynamic, run, spikes, tokens, unrolled

__all__ = ["CHECKS", "refused", "streamed"]

PIECES = ([1] * 11, [4, 1, 6], [11])
"""Lengths in which 11 tokens are fed to a stream."""


def refused(call: Callable[[], Any], *words: str, otherwise: str) -> None:
    """A call raises a `CapabilityError` in whose sentence one of the words stands.

    Raises:
        AssertionError: it answers, or the sentence says something else.
    """
    try:
        call()
    except CapabilityError as error:
        fits = any(word in str(error) for word in words)
        demand(fits, f"{otherwise}: expected a sentence with {' or '.join(words)!r}, got {error}")
        return
    raise AssertionError(otherwise)


# every part ---------------------------------------------------------------------------------


def says_what_it_is(subject: Subject) -> None:
    """Its entry has a summary and a config class."""
    entry = subject.entry
    demand(bool(entry.summary), "the class has no docstring, whose first paragraph is the summary")
    own = isinstance(entry.config, type) and issubclass(entry.config, Config)
    demand(own, "the class has no Config that derives from effformer.config.Config")


def name_dict_and_config_mean_the_same(subject: Subject) -> None:
    """All ways to write it give one config, JSON included."""
    kind, name = subject.kind, subject.name
    config = resolve(kind, {"name": name, **subject.options})
    for other in (config, config.to_dict()):
        demand(resolve(kind, other) == config, f"{other} is read as another config than {config}")


def refuses_unknown_options(subject: Subject) -> None:
    """A mistyped option is named."""
    try:
        resolve(subject.kind, {"name": subject.name, "no_such_option": 1})
    except ValueError as error:
        demand("unknown option 'no_such_option'" in str(error), f"an unknown option: {error}")
        return
    raise AssertionError("an unknown option is accepted")


def the_default_form_can_what_is_declared(subject: Subject) -> None:
    """The config's caps are those of the entry."""
    caps, declared = resolve(subject.kind, subject.name).caps(), subject.caps
    demand(caps == declared, f"declared is {declared}, the default form says {caps}")


def keeps_the_shape_and_every_parameter_learns(subject: Subject) -> None:
    """(B, N, D) stays so, twice the same; no parameter is left without a gradient."""
    part, x = subject.make(), tokens()
    out = run(part, x)
    demand(out.shape == x.shape, f"tokens {tuple(x.shape)} become {tuple(out.shape)}")
    demand(torch.equal(run(part, x), out), "the same tokens give another output the second time")
    # gates pass gradients on in training only, where they sample
    out = run(part.train(is_dynamic(part)), x)
    (out * torch.randn_like(out)).sum().backward()
    silent = [n for n, p in part.named_parameters() if p.grad is None or not p.grad.any()]
    demand(not silent, f"no gradient reaches {', '.join(silent)}")


def samples_do_not_see_each_other(subject: Subject) -> None:
    """A batch is its samples, one after the other."""
    part, x = subject.make(), tokens(batch=3)
    whole = run(part, x)
    for i in range(3):
        one = run(part, x[i : i + 1])
        assert_close(one, whole[i : i + 1], rtol=1e-4, atol=1e-5, what=f"sample {i} alone: ")


def gradients_are_exact(subject: Subject) -> None:
    """Backward and forward-mode derivatives equal differences, in float64."""
    part = subject.make().double()
    x = tokens(5, 1, torch.float64).requires_grad_()
    exact = torch.autograd.gradcheck(
        lambda x: run(part, x), (x,), fast_mode=True, check_forward_ad=True, raise_exception=True
    )
    demand(exact, "the gradient of the input is not that of the function")


def weights_are_all_that_it_keeps(subject: Subject) -> None:
    """Saved and loaded, it is the same part."""
    part, x = subject.make(), tokens()
    before = run(part, x)
    state = {k: v.clone() for k, v in part.state_dict().items()}
    with torch.no_grad():
        for p in part.parameters():
            p.add_(1.0)
    part.load_state_dict(state)
    demand(torch.equal(run(part, x), before), "loading its own weights gives another output")


def compiles_without_graph_breaks(subject: Subject) -> None:
    """`torch.compile(fullgraph=True)` takes it."""
    part, x = subject.make(), tokens()
    ctx = context_for(part, x)
    expected = part(x, ctx)
    torch.compiler.reset()
    compiled = torch.compile(part, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, ctx), expected)


def carries_its_state_forward_only(subject: Subject) -> None:
    """What is always causal ignores later tokens, and takes no mask."""
    part, x = subject.make(), tokens()
    changed, out = x.clone(), part(x)
    changed[:, 4] += 3
    after = part(changed)
    demand(torch.equal(after[:, :4], out[:, :4]), "outputs 0..3 change with token 4")
    demand(not torch.allclose(after[:, 5:], out[:, 5:]), "outputs 5.. do not depend on token 4")
    mask = torch.ones(2, 11, dtype=torch.bool)
    refused(
        lambda: part(x, Context(mask=mask)),
        "cannot honour mask; choices that can",
        otherwise="a mask is accepted",
    )


def streamed(part: Any, x: Tensor, pieces: list[int]) -> Tensor:
    """Outputs of tokens that are fed in pieces of these lengths."""
    state, outputs = part.init_state(x.shape[0], like=x), []
    for piece in x.split(pieces, dim=1):
        out, state = part.step(piece, state)
        outputs.append(out)
    return torch.cat(outputs, dim=1)


def streaming_equals_the_whole(subject: Subject) -> None:
    """Tokens fed in pieces give what they give at once."""
    # in double precision no spike or choice turns on a rounding error
    part = (subject.make(causal=True) if subject.kind == "attention" else subject.make()).double()
    x = tokens(11, dtype=torch.float64)
    whole = part(x)
    for pieces in PIECES:
        found, what = streamed(part, x, pieces), f"pieces of {pieces} tokens: "
        assert_close(found, whole, rtol=1e-4, atol=1e-5, what=what)


# token mixers -------------------------------------------------------------------------------


def causal_ignores_the_future(subject: Subject) -> None:
    """Output i depends on tokens up to i only, and on those."""
    part, x = subject.make(causal=True), tokens()
    out = run(part, x)
    changed = x.clone()
    changed[:, 6:] += torch.randn_like(changed[:, 6:])
    after = run(part, changed)
    off = float((after[:, :6] - out[:, :6]).detach().abs().max())
    demand(off <= 1e-6, f"outputs 0..5 change by {off:.1e} with tokens 6..10")
    demand(
        not torch.allclose(after[:, 6:], out[:, 6:]), "outputs 6.. do not change with tokens 6.."
    )


def padding_changes_nothing(subject: Subject) -> None:
    """Keys that a mask (B, M) hides have no influence; rows equal those of shorter batches."""
    x, mask = tokens(9), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, :2] = False
    other = torch.where(mask[..., None], x, torch.randn_like(x) * 9)
    for causal in subject.forms():
        part, what = subject.make(causal=causal), f"causal={causal}: "
        out = run(part, x, mask=mask)
        for i, real in ((0, slice(5)), (1, slice(2, None))):
            alone = run(part, x[i : i + 1, real])[0]
            assert_close(out[i, real], alone, rtol=1e-4, atol=1e-5, what=f"{what}without padding: ")
        again = run(part, other, mask=mask)
        said = f"{what}other padding: "
        assert_close(again[mask], out[mask], rtol=1e-4, atol=1e-5, what=said)


def full_masks_hold(subject: Subject) -> None:
    """A mask (B, 1, N, M) says who sees whom."""
    part, x = subject.make(), tokens(6)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    out = run(part, x, mask=mask)
    changed = x.clone()
    changed[:, 3:] += 1
    after = run(part, changed, mask=mask)
    assert_close(after[:, :3], out[:, :3], rtol=1e-5, atol=1e-5, what="tokens 3.. are hidden: ")


def packed_equals_looped(subject: Subject) -> None:
    """Several sequences in one row give what each gives alone."""
    x = tokens(7, 6)
    mask = torch.arange(7)[None] < torch.tensor([7, 3, 0, 3, 3, 1])[:, None]
    packing = Packing.from_mask(mask)
    for causal in subject.forms():
        part = subject.make(causal=causal)
        out = packing.unpack(part(packing.pack(x), Context(packing=packing)))
        for i, n in enumerate(packing.lengths):
            demand(not out[i, n:].any(), "padding is not zero after a packed row")
            if n:
                alone, what = part(x[i : i + 1, :n]), f"causal={causal}, sequence {i}: "
                assert_close(out[i : i + 1, :n], alone, rtol=1e-4, atol=1e-5, what=what)


def _sizes(state: object) -> object:
    if isinstance(state, tuple):
        return [_sizes(each) for each in state]
    return state.shape if isinstance(state, Tensor) else state


def linear_streaming_has_a_state_of_constant_size(subject: Subject) -> None:
    """Its state does not grow with the tokens."""
    part, x = subject.make(causal=True), tokens(8)
    state = part.init_state(2, like=x)
    _, after = part.step(x, state)
    demand(_sizes(state) == _sizes(after), f"the state {_sizes(state)} becomes {_sizes(after)}")


def cross_attention_takes_another_length(subject: Subject) -> None:
    """It attends to a memory of another length and width, and only if it was built for one."""
    part, memory, x = subject.make(memory_dim=10), torch.randn(2, 5, 10), tokens()
    out = part(x, Context(memory=memory))
    demand(out.shape == x.shape, f"tokens {tuple(x.shape)} become {tuple(out.shape)}")
    refused(lambda: part(x), "built for cross-attention", otherwise="it runs without its memory")
    refused(
        lambda: subject.make()(x, Context(memory=memory)),
        "built for self-attention",
        otherwise="built without a memory, it takes one",
    )


def linear_cost_is_linear(subject: Subject) -> None:
    """Twice the tokens are twice the work."""
    part = subject.make()
    short, long = part.macs(1024), part.macs(2048)
    demand(long <= 2.1 * short, f"1,024 tokens cost {short:,}, 2,048 cost {long:,}")


def rope_is_relative(subject: Subject) -> None:
    """Rotary positions count by their distance."""
    part, x, angles = subject.make(), tokens(6), torch.randn(4)

    def turned(start: float) -> Tensor:
        grid = (torch.arange(6) + start)[:, None] * angles
        return run(part, x, rope=Rope(grid.cos().repeat(1, 2), grid.sin().repeat(1, 2)))

    here = turned(0.0)
    assert_close(turned(3.5), here, rtol=1e-4, atol=1e-5, what="all positions moved by 3.5: ")
    demand(not torch.allclose(here, run(part, x)), "rotary tables change nothing")


def undeclared_capabilities_are_refused_with_choices(subject: Subject) -> None:
    """What it cannot honour it refuses, and names parts that can."""
    caps, part, x = subject.caps, subject.make(), tokens()
    table = torch.ones(11, DIM // HEADS)
    contexts = {
        "a mask of pairs": (caps.satisfies(mask="full"), torch.ones(2, 1, 11, 11) > 0, None),
        "a mask of keys": (caps.satisfies(mask="key"), torch.ones(2, 11) > 0, None),
        "rotary tables": (caps.rope, None, Rope(table, table)),
    }
    for what, (able, mask, rope) in contexts.items():
        if not able:
            ctx = Context(mask=mask, rope=rope)
            refused(
                lambda ctx=ctx: part(x, ctx),  # type: ignore[misc]
                "choices that can: ",
                otherwise=f"{what} are taken, although nothing of that kind is declared",
            )


def packing_and_mask_do_not_mix(subject: Subject) -> None:
    """A packed row has no padding."""
    mask = torch.ones(1, 11, dtype=torch.bool)
    part, x = subject.make(), tokens(batch=1)
    ctx = context_for(part, x, mask=mask, packing=Packing.from_mask(mask))
    refused(lambda: part(x, ctx), "pack", "mask", otherwise="a packed row with a mask is taken")


def taps_read_and_replace(subject: Subject) -> None:
    """Values of an attention can be read and replaced from outside."""
    part, x = subject.make(path="here"), tokens()
    if not hasattr(part, "core"):
        return
    tap = Tap(keep=("here.v",))
    out = part(x, context_for(part, x, tap=tap))
    assert_close(out, run(part, x), rtol=1e-5, atol=1e-6, what="with somebody reading: ")
    seen = tuple(tap.seen["here.v"].shape)
    demand(seen == (2, HEADS, 11, DIM // HEADS), f"the values that are read have shape {seen}")
    zero = Tap(edit=lambda place, value: torch.zeros_like(value), at=("here.v",))
    out = part(x, context_for(part, x, tap=zero))
    bias = torch.zeros(DIM) if part.proj.bias is None else part.proj.bias
    assert_close(out, bias.expand_as(x), rtol=1e-5, atol=1e-6, what="with values of zero: ")


# blocks -------------------------------------------------------------------------------------


def macs_of_a_block_add_up(subject: Subject) -> None:
    """Its work is that of its branches, its modulation and its slots."""
    block: Any = subject.make()
    parts = [b.part.macs(11) for b in block.branches]
    modulation = DIM * 3 * len(parts) * DIM if subject.cond else 0
    own: Any = unrolled(block)
    slots = 0 if own.width is None else own.width.macs()
    slots += 0 if own.tokens is None else own.tokens.macs(11)
    times = getattr(block, "times", 1)  # an iterated block runs its branches several times
    expected, said = times * (sum(parts) + modulation + slots), block.macs(11)
    demand(said == expected, f"macs(11) is {said:,}, its parts make {expected:,}")


def _every(subject: Subject) -> bool:
    return True


def _named(subject: Subject) -> bool:
    return not subject.cond  # once for both forms of a block


def _mixer(subject: Subject, **caps: object) -> bool:
    return subject.kind == "attention" and subject.caps.satisfies(**caps)


def _smooth(subject: Subject) -> bool:
    return not spikes(subject.make())  # the gradient of a spike is a surrogate, no derivative


CHECKS: tuple[Check, ...] = (
    Check(says_what_it_is, _named),
    Check(name_dict_and_config_mean_the_same, _named),
    Check(refuses_unknown_options, _named),
    Check(the_default_form_can_what_is_declared, lambda s: s.kind == "attention" and not s.options),
    Check(keeps_the_shape_and_every_parameter_learns, _every),
    Check(samples_do_not_see_each_other, _every),
    Check(gradients_are_exact, _smooth),
    Check(weights_are_all_that_it_keeps, _every),
    Check(compiles_without_graph_breaks, _every),
    Check(carries_its_state_forward_only, lambda s: s.carries and not s.cond),
    Check(streaming_equals_the_whole, lambda s: s.kind != "block" and s.caps.streaming),
    Check(causal_ignores_the_future, lambda s: _mixer(s, causal=True)),
    Check(padding_changes_nothing, lambda s: _mixer(s, mask="key")),
    Check(full_masks_hold, lambda s: _mixer(s, mask="full")),
    Check(packed_equals_looped, lambda s: _mixer(s, packed=True)),
    Check(
        linear_streaming_has_a_state_of_constant_size, lambda s: _mixer(s, streaming=True, cost="n")
    ),
    Check(cross_attention_takes_another_length, lambda s: _mixer(s, cross=True)),
    Check(linear_cost_is_linear, lambda s: _mixer(s, cost="n")),
    # of random features it is the expectation
    Check(rope_is_relative, lambda s: _mixer(s, rope=True) and s.name != "performer"),
    Check(undeclared_capabilities_are_refused_with_choices, _mixer),
    Check(packing_and_mask_do_not_mix, _mixer),
    Check(taps_read_and_replace, _mixer),
    Check(macs_of_a_block_add_up, lambda s: s.kind == "block" and not s.caps.joint),
)
"""What is checked without other packages, and whom it concerns."""
