"""The contract of capabilities in pairs: what a mixer can do, it can do together, or it says that it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from effformer.checks import CapabilityError
from effformer.context import Context, Merging, Packing, Rope
from effformer.registry import Caps, attention

from .report import Check, demand
from .subjects import DIM, HEADS, Subject, context_for, make_mixer

__all__ = [
    "CHECKS", "FIELDS", "MASK", "PACKING", "PAIRS", "PLACES", "N", "able", "both_capabilities_hold_together", "draw", "other",
    "part_of", "same", "tables", "with_keys",
]  # fmt: skip

WIDTH, N = DIM // HEADS, 9
FREQUENCIES = torch.tensor([1.0, 0.4, 0.1, 0.03], dtype=torch.float64)
MASK = torch.ones(2, N, dtype=torch.bool)
MASK[0, 5:] = False
MASK[1, :2] = False
PACKING = Packing.from_mask(torch.arange(7) < torch.tensor([[7], [3], [0], [3], [1]]))


@contextmanager
def refusing(words: str) -> Iterator[None]:
    """What stands inside raises a `CapabilityError` with these words in its sentence.

    Raises:
        AssertionError: it answers, or the sentence says something else.
    """
    try:
        yield
    except CapabilityError as error:
        demand(words in str(error), f"expected a sentence with {words!r}, got {error}")
        return
    raise AssertionError(f"this is answered, and should be refused with {words!r}")


def part_of(name: str, causal: bool | None = None, **more: Any) -> Any:
    """A mixer in float64, with the same random features every time."""
    torch.manual_seed(7)
    return make_mixer(name, causal=causal, **more).double()


def draw(n: int = N, batch: int = 2, dim: int = DIM, seed: int = 1) -> Tensor:
    """Tokens (batch, n, dim) in float64."""
    return torch.randn(
        batch, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def tables(places: Tensor) -> Rope:
    """Of places (N,), or (B, N) for samples of their own."""
    angles = (places.double()[..., None] * FREQUENCIES).repeat_interleave(2, dim=-1)
    angles = angles if places.dim() == 1 else angles[:, None]
    return Rope(angles.cos(), angles.sin(), interleaved=True)


def with_keys(rope: Rope, keys: Rope) -> Rope:
    """Tables of queries, with others for the keys."""
    return Rope(rope.cos, rope.sin, keys.cos, keys.sin, rope.interleaved)


PLACES = torch.stack([torch.arange(7) + 3 * i for i in range(5)])
"""Of the padded samples of `PACKING`, which stand at places of their own."""


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    """Equal but for rounding, which is as large as the largest number allows."""
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * largest)


def other(found: Tensor, expected: Tensor) -> None:
    """Not the same: far above rounding."""
    assert float((found - expected).detach().abs().max()) > 1e-6


def run(part: Any, x: Tensor, **fields: Any) -> Tensor:
    return part(x, context_for(part, x, **fields))


def forms(name: str) -> list[bool]:
    """Not causal and causal, as far as there are such."""
    return [c for c in (False, True) if attention.get(name).caps.satisfies(causal=c)]


def later(x: Tensor, start: int) -> Tensor:
    """Other tokens from ``start`` on."""
    return torch.cat([x[:, :start], draw(x.shape[1] - start, x.shape[0], seed=9)], dim=1)


def looped(part: Any, x: Tensor, each: Any) -> Tensor:
    """Every sequence of `PACKING` alone, in one row; ``each(i)`` are its context fields."""
    rows = [run(part, x[i : i + 1, :n], **each(i, n)) for i, n in enumerate(PACKING.lengths) if n]
    return torch.cat(rows, dim=1)


def stream(part: Any, x: Tensor, each: Any, pieces: tuple[int, ...] = (1, 4, 4)) -> Tensor:
    """Piece by piece; ``each(rows)`` are the context fields of some tokens."""
    state, outputs, start = part.init_state(x.shape[0], like=x), [], 0
    for size in pieces:
        rows = slice(start, start + size)
        out, state = part.step(x[:, rows], state, Context(**each(rows)))
        outputs.append(out)
        start += size
    return torch.cat(outputs, dim=1)


# causal order -------------------------------------------------------------------------------


def causal_mask(name: str, **more: Any) -> None:
    part, x = part_of(name, True, **more), draw()
    out = run(part, x, mask=MASK)
    same(out[0, :5], run(part, x[:1, :5])[0])
    same(out[1, 2:], run(part, x[1:, 2:])[0])
    after = run(part, later(x, 4), mask=MASK)
    same(after[:, :4][MASK[:, :4]], out[:, :4][MASK[:, :4]])


def causal_rope(name: str, **more: Any) -> None:
    part, x, places = part_of(name, True, **more), draw(), torch.arange(N)
    out = run(part, x, rope=tables(places))
    moved = torch.where(places < 6, places, 3 * places)
    same(run(part, later(x, 6), rope=tables(moved))[:, :6], out[:, :6])
    # earlier tokens stand elsewhere: what looks at them must notice
    earlier = torch.where(places < 6, 5 * places - 40, places)
    other(run(part, x, rope=tables(earlier))[:, 6:], out[:, 6:])


def causal_packed(name: str, **more: Any) -> None:
    part, x = part_of(name, True, **more), draw(7, 5)
    out = part(PACKING.pack(x), Context(packing=PACKING))
    same(out, looped(part, x, lambda i, n: {}))
    after = part(PACKING.pack(later(x, 2)), Context(packing=PACKING))
    early = PACKING.positions < 2
    same(after[:, early], out[:, early])
    other(after[:, ~early], out[:, ~early])


def causal_streaming(name: str, **more: Any) -> None:
    part, x = part_of(name, True, **more), draw()
    same(stream(part, x, lambda rows: {}), part(x))
    same(stream(part, x, lambda rows: {}, (1,) * N), part(x))


def causal_width(name: str, **more: Any) -> None:
    part, x = part_of(name, True, **more), draw()
    out = _cut(part, x)
    same(_cut(part, later(x, 4))[:, :4], out[:, :4])


def causal_sizes(name: str, **more: Any) -> None:
    part = part_of(name, True, **more)
    _counted(part)


def causal_axes(name: str, **more: Any) -> None:
    part, x = part_of(name, True, **more), draw(8)
    out = part(x, Context(grid=(2, 4)))
    same(part(later(x, 5), Context(grid=(2, 4)))[:, :5], out[:, :5])
    other(part(later(x, 4), Context(grid=(2, 4)))[:, 4:], out[:, 4:])


def causal_cross(name: str, **more: Any) -> None:
    """A memory has no order that tokens could follow."""
    if not hasattr(make_mixer(name), "core"):
        raise AssertionError("a mixer without a core needs a proof of its own")
    with refusing("no order in common; causal=False would do"):
        part_of(name, True, memory_dim=DIM)


# a memory -----------------------------------------------------------------------------------


def cross_mask(name: str, **more: Any) -> None:
    part, x, memory = part_of(name, memory_dim=DIM, **more), draw(4), draw()
    out = part(x, Context(memory=memory, memory_mask=MASK))
    same(out[:1], part(x[:1], Context(memory=memory[:1, :5])))
    same(out[1:], part(x[1:], Context(memory=memory[1:, 2:])))
    with refusing("memory_mask"):
        part(x, Context(memory=memory, mask=MASK[:, :4]))


def cross_rope(name: str, **more: Any) -> None:
    part, x, memory = part_of(name, memory_dim=DIM, **more), draw(4), draw()

    def out(here: float, there: float) -> Tensor:
        own, far = tables(torch.arange(4) + here), tables(1.5 * torch.arange(N) + there)
        return part(x, Context(memory=memory, rope=with_keys(own, far)))

    if name != "performer":  # of random features only the expectation is relative
        same(out(5, 5), out(0, 0))
    other(out(0, 5), out(0, 0))
    other(out(5, 0), out(0, 0))
    with refusing("turn one side only"):
        part(x, Context(memory=memory, rope=tables(torch.arange(4))))


def cross_width(name: str, **more: Any) -> None:
    part = part_of(name, memory_dim=DIM, **more)
    _cut(part, draw(4), memory=draw())


def cross_sizes(name: str, **more: Any) -> None:
    """Tokens that were merged do not change what the memory says."""
    part, x, memory = part_of(name, memory_dim=DIM, **more), draw(N), draw(seed=3)
    sizes = torch.full((2, N), 2.0, dtype=torch.float64)
    sizes[:, 0] = 5
    merging = Merging(tokens=2 * N, sizes=sizes)
    same(part(x, Context(memory=memory, merging=merging)), part(x, Context(memory=memory)))


def cross_packed(name: str, **more: Any) -> None:
    part = part_of(name, memory_dim=DIM, **more)
    with refusing("packing goes with neither mask nor memory"):
        part(PACKING.pack(draw(7, 5)), Context(memory=draw(4, 1), packing=PACKING))


def cross_streaming(name: str, **more: Any) -> None:
    """Step by step is the whole; the memory is projected once."""
    part, x, memory = part_of(name, memory_dim=DIM, **more), draw(), draw(6, seed=3)
    mask = MASK[:, :6]
    if part.core.competes:
        state = part.init_state(2, like=x)
        with refusing("compete for the memory"):
            part.step(x, state, Context(memory=memory))
        return
    calls: list[int] = []
    part.kv.register_forward_hook(lambda *_: calls.append(1))
    found = stream(part, x, lambda rows: {"memory": memory, "memory_mask": mask})
    assert len(calls) == 1
    same(found, part(x, Context(memory=memory, memory_mask=mask)))


# rotary positions ---------------------------------------------------------------------------


def mask_rope(name: str, **more: Any) -> None:
    for causal in forms(name):
        part, x = part_of(name, causal, **more), draw()
        places = torch.arange(N) + torch.tensor([[0], [4]])
        out = run(part, x, mask=MASK, rope=tables(places))
        same(out[0, :5], run(part, x[:1, :5], rope=tables(places[0, :5]))[0])
        same(out[1, 2:], run(part, x[1:, 2:], rope=tables(places[1, 2:]))[0])
        other(out[0, :5], run(part, x[:1, :5])[0])


def packed_rope(name: str, **more: Any) -> None:
    for causal in forms(name):
        part, x = part_of(name, causal, **more), draw(7, 5)
        row = tables(PACKING.pack(PLACES.unsqueeze(-1))[0, :, 0])
        out = part(PACKING.pack(x), Context(packing=PACKING, rope=row))
        same(out, looped(part, x, lambda i, n: {"rope": tables(PLACES[i, :n])}))
        other(out, looped(part, x, lambda i, n: {}))


def rope_streaming(name: str, **more: Any) -> None:
    part, x = part_of(name, True, **more), draw()
    rope = tables(2 * torch.arange(N))
    found = stream(part, x, lambda rows: {"rope": rope.tokens(rows)})
    same(found, part(x, Context(rope=rope)))
    other(found, part(x))


def rope_width(name: str, **more: Any) -> None:
    part, x = part_of(name, **more), draw()
    other(_cut(part, x, rope=tables(torch.arange(N))), _cut(part, x))
    scale = torch.arange(1, HEADS + 1)[:, None, None]  # every head has tables of its own
    angles = torch.arange(N)[:, None] * FREQUENCIES.repeat_interleave(2) * scale
    _cut(part, x, rope=Rope(angles.cos(), angles.sin(), interleaved=True))


def rope_sizes(name: str, **more: Any) -> None:
    part, rope = part_of(name, **more), tables(torch.arange(5))
    other(_counted(part, rope=rope), _counted(part))


def axes_rope(name: str, **more: Any) -> None:
    part, x, places = part_of(name, **more), draw(8), torch.arange(8) ** 2
    out = part(x, Context(grid=(2, 4), rope=tables(places)))
    for rows in (slice(0, 4), slice(4, 8)):
        same(out[:, rows], run(part, x[:, rows], rope=tables(places[rows])))
    other(out, part(x, Context(grid=(2, 4))))


# masks, rows, factors -----------------------------------------------------------------------


def mask_packed(name: str, **more: Any) -> None:
    part, x = part_of(name, **more), draw(7, 5)
    row = PACKING.pack(x)
    with refusing("pack"):
        run(part, row, packing=PACKING, mask=torch.ones(1, row.shape[1], dtype=torch.bool))


def mask_streaming(name: str, **more: Any) -> None:
    _no_stream(name, "mask", MASK[:, :3], more)


def packed_streaming(name: str, **more: Any) -> None:
    _no_stream(name, "packing", Packing.from_mask(MASK[:, :3]), more)


def streaming_width(name: str, **more: Any) -> None:
    _no_stream(name, "width", torch.ones(2, HEADS), more)


def sizes_streaming(name: str, **more: Any) -> None:
    _no_stream(name, "merging", Merging(tokens=5, sizes=torch.ones(2, 3)), more)


def _no_stream(name: str, field: str, value: Any, more: Mapping[str, Any]) -> None:
    part, x = part_of(name, True, **more), draw(3)
    with refusing(f"streaming takes no {field}"):
        part.step(x, part.init_state(2, like=x), Context(**{field: value}))


def axes_mask(name: str, **more: Any) -> None:
    part, x = part_of(name, **more), draw(8)
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]] * 2, dtype=torch.bool)
    out = part(x, Context(grid=(2, 4), mask=mask))
    same(out[:, 4:], run(part, x[:, 4:]))
    same(out[:, :3], run(part, x[:, :3]))


def axes_width(name: str, **more: Any) -> None:
    part = part_of(name, **more)
    _cut(part, draw(8), grid=(2, 4))


def mask_width(name: str, **more: Any) -> None:
    for causal in forms(name):
        part, x = part_of(name, causal, **more), draw()
        out = _cut(part, x, mask=MASK)
        width = torch.tensor([[1.0, 0.0, 1.0]]).double()
        same(out[0, :5], run(part, x[:1, :5], width=width)[0])


def packed_width(name: str, **more: Any) -> None:
    for causal in forms(name):
        part, x = part_of(name, causal, **more), draw(7, 5)
        width = torch.rand(5, HEADS, generator=torch.Generator().manual_seed(2)).double()
        width[1, 0] = 0
        out = part(PACKING.pack(x), Context(packing=PACKING, width=width))
        same(out, looped(part, x, lambda i, n, width=width: {"width": width[i : i + 1]}))


def mask_sizes(name: str, **more: Any) -> None:
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    _counted(part_of(name, **more), mask=mask)


def packed_sizes(name: str, **more: Any) -> None:
    part = part_of(name, **more)
    merging = Merging(tokens=20, sizes=torch.ones(1, 14))
    with refusing("packing goes with neither"):
        part(PACKING.pack(draw(7, 5)), Context(packing=PACKING, merging=merging))


def sizes_width(name: str, **more: Any) -> None:
    part, sizes = part_of(name, **more), torch.arange(1.0, N + 1).expand(2, -1).double()
    _cut(part, draw(), merging=Merging(tokens=50, sizes=sizes))


def _cut(part: Any, x: Tensor, **fields: Any) -> Tensor:
    """A head without weight, and a part without this head, are the same; returns the output."""
    width = torch.tensor([[1.0, 0.0, 1.0]] * x.shape[0]).double()
    out = run(part, x, width=width, **fields)
    small = part.select(torch.tensor([0, 2]))
    same(run(small, x, **fields), out)
    other(run(part, x, **fields), out)
    return out


def _counted(part: Any, **fields: Any) -> Tensor:
    """Tokens that stand for several are as many equal tokens."""
    x, count = draw(5), torch.tensor([1, 3, 2, 1, 4])
    every = torch.arange(5).repeat_interleave(count)
    more = dict(fields)
    if "mask" in more:
        more["mask"] = more["mask"][:, every]
    if "rope" in more:
        rope = more["rope"]
        more["rope"] = Rope(rope.cos[every], rope.sin[every], interleaved=True)
    sizes = count.double().expand(2, -1)
    found = part(x, Context(merging=Merging(tokens=11, sizes=sizes), **fields))
    whole = part(x[:, every], Context(**more))
    ends = count.cumsum(0) - 1
    same(found, whole[:, ends])
    other(found, part(x, Context(**fields)))
    return found


FIELDS = ("axes", "causal", "cross", "mask", "packed", "rope", "sizes", "streaming", "width")
"""Capabilities of a mixer that say what its context may carry, or in which form it runs."""

PAIRS = {
    ("axes", "causal"): causal_axes,
    ("axes", "mask"): axes_mask,
    ("axes", "rope"): axes_rope,
    ("axes", "width"): axes_width,
    ("causal", "cross"): causal_cross,
    ("causal", "mask"): causal_mask,
    ("causal", "packed"): causal_packed,
    ("causal", "rope"): causal_rope,
    ("causal", "sizes"): causal_sizes,
    ("causal", "streaming"): causal_streaming,
    ("causal", "width"): causal_width,
    ("cross", "mask"): cross_mask,
    ("cross", "packed"): cross_packed,
    ("cross", "rope"): cross_rope,
    ("cross", "sizes"): cross_sizes,
    ("cross", "streaming"): cross_streaming,
    ("cross", "width"): cross_width,
    ("mask", "packed"): mask_packed,
    ("mask", "rope"): mask_rope,
    ("mask", "sizes"): mask_sizes,
    ("mask", "streaming"): mask_streaming,
    ("mask", "width"): mask_width,
    ("packed", "rope"): packed_rope,
    ("packed", "sizes"): packed_sizes,
    ("packed", "streaming"): packed_streaming,
    ("packed", "width"): packed_width,
    ("rope", "sizes"): rope_sizes,
    ("rope", "streaming"): rope_streaming,
    ("rope", "width"): rope_width,
    ("sizes", "streaming"): sizes_streaming,
    ("sizes", "width"): sizes_width,
    ("streaming", "width"): streaming_width,
}


def able(caps: Caps, pair: tuple[str, str]) -> bool:
    """A mixer declares both; every cross-attention can be fed step by step."""
    apart = {"causal": True, "mask": "key"}
    wanted = ["cross"] if pair == ("cross", "streaming") else list(pair)
    return all(
        bool(caps.axes) if cap == "axes" else caps.satisfies(**{cap: apart.get(cap, True)})
        for cap in wanted
    )


def both_capabilities_hold_together(subject: Subject) -> None:
    """What is declared holds in pairs: a causal order in packed rows, rotary positions in a stream, ..."""
    for pair, prove in PAIRS.items():
        if able(subject.caps, pair):
            try:
                prove(subject.name, options=subject.options)
            except AssertionError as error:
                raise AssertionError(f"{' and '.join(pair)}: {error}") from error


CHECKS = (Check(both_capabilities_hold_together, lambda s: s.kind == "attention"),)
