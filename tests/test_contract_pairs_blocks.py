"""Blocks: padding, packed rows and streams, each together with everything else that a block takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract import BLOCKS, JOINT, make_block
from torch import Tensor

from effformer import registry
from effformer.blocks import init_states
from effformer.checks import CapabilityError
from effformer.context import Context, Merging, Stream, Tap
from effformer.testing.pairs import MASK, PACKING, PLACES, N, draw, other, same, tables, with_keys

EXTRAS = ("plain", "cond", "rope", "width", "tokens", "cross", "cross-rope", "cross-twice")
CONDS = {"never": [False], "optional": [False, True], "always": [True]}


def takes(name: str, extra: str) -> bool:
    caps = registry.block.get(name).caps
    if extra in ("cond", "width"):  # gates of heads and channels read the time embedding
        return caps.cond != "never"
    if extra == "tokens":
        return caps.sequential
    return caps.cross if "cross" in extra else True


def build(name: str, extra: str, *, causal: bool = False) -> Any:
    always = registry.block.get(name).caps.cond == "always"
    slots = {extra: "dynamic"} if extra in ("width", "tokens") else {}
    block = make_block(
        name, cond=always or extra in ("cond", "width"), causal=causal,
        cross="softmax" if "cross" in extra else None, memories=1 + (extra == "cross-twice"), **slots,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, p in block.named_parameters():
            if ".gates." in key:  # some open, some closed
                p.normal_(std=0.5, generator=generator)
    return block.double()


def fields(block: Any, extra: str, batch: int) -> dict[str, Any]:
    """What samples of their own need, but for rotary tables."""
    given: dict[str, Any] = {}
    if block.site.cond_dim is not None:
        given["cond"] = 2 * draw(1, batch, seed=4)[:, 0]
        given["time"] = 2 * draw(1, batch, seed=5)[:, 0]
    if "cross" in extra:
        given["memory"], given["memory_mask"] = draw(6, batch, seed=6), torch.arange(6) < 5
        given["memory_mask"] = given["memory_mask"].expand(batch, -1)
    if extra == "cross-twice":
        given["memory"] = given["memory"], draw(3, batch, seed=7)
        given["memory_mask"] = given["memory_mask"], None
    return given


def turns(extra: str, places: Tensor) -> dict[str, Any]:
    if extra == "rope":
        return {"rope": tables(places)}
    if extra == "cross-rope":
        return {"rope": with_keys(tables(places), tables(torch.arange(6) * 2))}
    return {}


def sample(ctx: Context, i: int) -> Context:
    return ctx.rows(torch.tensor([i]))


def masked(name: str, extra: str) -> None:
    block, x = build(name, extra), draw()
    places = torch.arange(N) + torch.tensor([[0], [4]])
    ctx = Context(**fields(block, extra, 2))
    out = block(x, replace(ctx, mask=MASK, **turns(extra, places)))
    for i, rows in enumerate((slice(0, 5), slice(2, None))):
        own = replace(sample(ctx, i), **turns(extra, places[i, rows]))
        same(out[i, rows], block(x[i : i + 1, rows], own)[0])


def packed(name: str, extra: str) -> None:
    block, x = build(name, extra), draw(7, 5)
    ctx = Context(**fields(block, extra, 5))
    places = PACKING.pack(PLACES[..., None])[0, :, 0]
    out = block(PACKING.pack(x), replace(ctx, packing=PACKING, **turns(extra, places)))
    alone = [
        block(x[i : i + 1, :n], replace(sample(ctx, i), **turns(extra, PLACES[i, :n])))
        for i, n in enumerate(PACKING.lengths)
        if n
    ]
    same(out, torch.cat(alone, dim=1))
    if "cond" in extra:
        other(out, torch.cat([block(x[:1, :n], sample(ctx, 0)) for n in PACKING.lengths if n], 1))


def streamed(name: str, extra: str) -> None:
    block, x = build(name, extra, causal=True), draw()
    ctx, places = Context(**fields(block, extra, 2)), torch.arange(N) * 2
    states, outputs = init_states(block, 2, like=x), []
    for rows in (slice(0, 1), slice(1, 5), slice(5, N)):
        stream = Stream(states)
        outputs.append(block(x[:, rows], replace(ctx, stream=stream, **turns(extra, places[rows]))))
        states = stream.after
    same(torch.cat(outputs, dim=1), block(x, replace(ctx, **turns(extra, places))))


MODES: dict[str, Callable[[str, str], None]] = {
    "masked": masked,
    "packed": packed,
    "streamed": streamed,
}
REFUSED = {
    ("packed", "cross"): "packing goes with neither",
    ("packed", "cross-rope"): "packing goes with neither",
    ("packed", "cross-twice"): "packing goes with neither",
    ("streamed", "width"): "streaming takes no width",
    ("streamed", "iterate"): "cannot stream 4 steps",
    ("streamed", "flowtransformer-decoder"): "takes neither a memory nor a stream",
    ("masked", "spiking-lmu"): "cannot honour mask",
    ("packed", "spiking-lmu"): "cannot honour packing",
    ("packed", "expert-adaln"): "cannot honour packed=True",  # tests/blocks/test_expert.py
}
"""By mode and extra, or mode and block."""
ALONE = [b for b in BLOCKS if b not in JOINT]
"""Of two streams each has its masks, rows and places; tests/blocks/test_joint.py pairs those."""
CASES = [(m, b, e) for m in MODES for b in ALONE for e in EXTRAS if takes(b, e)]


@pytest.mark.parametrize(("mode", "block", "extra"), CASES, ids=["-".join(c) for c in CASES])
@torch.no_grad()
def test_both_hold_together(mode: str, block: str, extra: str) -> None:
    why = REFUSED.get((mode, block), REFUSED.get((mode, extra)))
    if why is None:
        MODES[mode](block, extra)
        return
    with pytest.raises(CapabilityError, match=why):
        MODES[mode](block, extra)


@pytest.mark.parametrize("name", [b for b in ALONE if takes(b, "cond")])
@torch.no_grad()
def test_conditioning_on_a_grid(name: str) -> None:
    for attn in ("axes", "agent"):
        block, x = make_block(name, cond=True, attn=attn).double(), draw(8, 3)
        ctx = Context(cond=2 * draw(1, 3)[:, 0], time=draw(1, 3)[:, 0], grid=(2, 4))
        out = block(x, ctx)
        for i in range(3):
            same(out[i : i + 1], block(x[i : i + 1], sample(ctx, i)))


@pytest.mark.parametrize("name", [b for b in ALONE if takes(b, "cond")])
@torch.no_grad()
def test_conditioning_of_every_token(name: str) -> None:
    block, x = build(name, "cond"), draw()
    given = fields(block, "cond", 2)
    each = 2 * draw(N, seed=8)
    plain = block(x, Context(**given))
    same(block(x, Context(**given | {"cond": given["cond"][:, None].expand(-1, N, -1)})), plain)
    out = block(x, Context(**given | {"cond": each}))
    other(out, plain)
    order = torch.arange(N).flip(0)
    same(block(x[:, order], Context(**given | {"cond": each[:, order]}))[:, order], out)
    if name in registry.block.names(packed=True):
        row, lengths = draw(7, 5), PACKING.lengths
        cond, time = 2 * draw(7, 5, seed=9), draw(1, 5)[:, 0]
        packed = Context(cond=PACKING.pack(cond), time=time, packing=PACKING)
        alone = [
            block(row[i : i + 1, :n], Context(cond=cond[i : i + 1, :n], time=time[i : i + 1]))
            for i, n in enumerate(lengths)
            if n
        ]
        same(block(PACKING.pack(row), packed), torch.cat(alone, dim=1))
    with pytest.raises(ValueError, match=r"cond has shape \(2, 3, \d+\), but there are"):
        block(x, Context(**given | {"cond": each[:, :3]}))


@pytest.mark.parametrize("name", [b for b in ALONE if takes(b, "cond")])
@torch.no_grad()
def test_conditioning_of_every_token_that_is_streamed(name: str) -> None:
    if ("streamed", name) in REFUSED:
        return
    block, x, cond = build(name, "cond", causal=True), draw(), 2 * draw(seed=8)
    time = draw(1)[:, 0]
    states, outputs = init_states(block, 2, like=x), []
    for rows in (slice(0, 1), slice(1, 5), slice(5, N)):
        stream = Stream(states)
        outputs.append(block(x[:, rows], Context(cond=cond[:, rows], time=time, stream=stream)))
        states = stream.after
    same(torch.cat(outputs, dim=1), block(x, Context(cond=cond, time=time)))


@torch.no_grad()
def test_conditioning_of_every_token_on_a_grid_and_where_tokens_are_chosen() -> None:
    cond, time, x = 2 * draw(8, 3, seed=4), draw(1, 3)[:, 0], draw(8, 3)
    ctx = Context(cond=cond, time=time, grid=(2, 4))
    axes = make_block("adaln-zero", cond=True, attn="axes").double()
    out = axes(x, ctx)
    for i in range(3):
        same(out[i : i + 1], axes(x[i : i + 1], sample(ctx, i)))
    chosen = make_block("adaln-zero", cond=True, tokens="dynamic").double()
    for p in chosen.tokens.gates.parameters():
        p.normal_(std=0.5, generator=torch.Generator().manual_seed(5))
    for rows in (slice(0, 3), slice(0, 1)):
        own = replace(ctx, cond=cond[rows], time=time[rows])
        tap = Tap()  # under which all tokens run, and are multiplied by their gates
        same(chosen(x[rows], own), chosen(x[rows], replace(own, tap=tap)))
    merging = make_block("adaln-zero", cond=True, tokens="tome").double()
    equal = replace(ctx, cond=cond[:, :1].expand(-1, 8, -1))
    same(merging(x, equal), merging(x, replace(ctx, cond=cond[:, 0])))
    other(merging(x, ctx), merging(x, equal))
    merging.tokens.restore = False
    with pytest.raises(CapabilityError, match=r"stay merged, but ctx\.cond has a vector for each"):
        merging(x, replace(ctx, merging=Merging(tokens=8)))


@torch.no_grad()
def test_each_side_of_a_decoder_has_its_own_tables() -> None:
    """Moving tokens and memory together changes nothing, moving one of them does."""
    block, x, memory = build("prenorm", "cross-rope"), draw(), draw(6, seed=6)

    def out(here: float, there: float) -> Tensor:
        rope = with_keys(tables(torch.arange(N) + here), tables(torch.arange(6) + there))
        return block(x, Context(memory=memory, rope=rope))

    same(out(3, 3), out(0, 0))
    other(out(0, 3), out(0, 0))
    own = block(x, Context(memory=memory, rope=tables(torch.arange(N))))
    other(own, block(x, Context(memory=memory)))
    other(own, out(0, 0))


def test_blocks_that_pack_say_so() -> None:
    packing = [b for b in BLOCKS if ("packed", b) not in REFUSED]
    assert packing == registry.block.names(packed=True)
