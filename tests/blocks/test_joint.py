"""Two streams that meet in one attention, against the obvious form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effformer import registry
from effformer.attention import Attention
from effformer.blocks import BackboneConfig, Joint, Needs, build_stack
from effformer.checks import CapabilityError
from effformer.config import resolve
from effformer.context import Context, Ledger, Merging, Packing, Rope, Stream, Tap
from effformer.nn.rope import GridRope
from effformer.places import rotate
from effformer.site import NormRule, Site

DIM, HEADS, N, M = 24, 3, 7, 4
CORES = registry.core.names(order_free=True)
ROWS = (*CORES, "retention", "gated-delta")
"""With two that read the tokens in a row; the heads of one convolve each stream before."""
PLACED = [
    (core, placed)
    for core in ROWS
    for placed in (False, True)
    if registry.core.get(core).caps.rope or not placed
]


def build(
    attn: Any = "softmax", ffn: Any = "mlp", *, ends: bool = False, cond: bool = True,
    dual: int = 0, norm: NormRule | None = None, **slots: str,
) -> Joint:  # fmt: skip
    """A block in float64 with open gates."""
    torch.manual_seed(0)
    there, rule = DIM if cond else None, NormRule() if norm is None else norm
    site = Site(
        dim=DIM, heads=HEADS, cond_dim=there, time_dim=there, norm=rule, path="b",
        depth=1 if ends else 2,
    )  # fmt: skip
    parts = {"attn": resolve("attention", attn), "ffn": resolve("ffn", ffn)}
    block: Joint = Joint.Config(dual=dual).build(site, **parts)
    block.attach(**{kind: resolve(kind, name) for kind, name in slots.items()})
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.3)
    return block.double().eval()


def inputs(batch: int = 2, **fields: Any) -> tuple[Tensor, Tensor, Context]:
    torch.manual_seed(1)
    x, y = (torch.randn(batch, n, DIM, dtype=torch.float64) for n in (N, M))
    cond, time = torch.randn(2, batch, DIM, dtype=torch.float64)
    return x, y, Context(cond=cond, time=time, **fields)


def table(n: int) -> Rope:
    """Places on a line, for heads of width 8."""
    rope = GridRope(GridRope.Config(), DIM // HEADS, heads=HEADS, depth=1, axes=1)
    (made,) = rope(rope.positions((n,)) + 1, like=torch.zeros(1, dtype=torch.float64))
    return made


def _normed(x: Tensor, norm: Any, kind: str | None) -> Tensor:
    if kind == "rms":
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
    return F.layer_norm(x, (DIM // HEADS,), norm.weight, norm.bias, eps=1e-6)


def obvious(
    block: Joint, x: Tensor, y: Tensor, cond: Tensor, mask: Tensor | None, rope: Rope | None
) -> tuple[Tensor, Tensor]:
    """The equations, token rows joined by hand, softmax over all of them."""
    q, k, v, mods = [], [], [], []
    for stream, s in ((block.y, y), (block.x, x)):
        linear, heads = stream.modulation.linear, stream.attn.part
        made = (F.silu(cond) @ linear.weight.T + linear.bias)[:, None]
        mods.append(made.split(DIM, dim=-1))
        h = F.layer_norm(s, (DIM,), eps=1e-6) * (1 + mods[-1][1]) + mods[-1][0]
        rows = (h @ heads.qkv.weight.T + heads.qkv.bias).split(DIM, dim=-1)
        for kept, row in zip((q, k, v), rows, strict=True):
            kept.append(row.unflatten(-1, (HEADS, -1)).transpose(1, 2))
        for kept, norm in ((q, "q_norm"), (k, "k_norm")):
            if block.x.attn.part.config.qk_norm:
                kept[-1] = _normed(kept[-1], getattr(heads, norm), block.site.norm.qk_kind)
            if rope is not None and stream is block.x:
                kept[-1] = rotate(kept[-1], rope.cos, rope.sin, interleaved=True)
    q, k, v = (torch.cat(rows, dim=2) for rows in (q, k, v))
    logits = q @ k.transpose(-1, -2) / (DIM // HEADS) ** 0.5
    if mask is not None:
        whole = torch.cat([mask, mask.new_ones(len(mask), x.shape[1])], dim=1)
        logits = logits.masked_fill(~whole[:, None, None], -torch.inf)
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).split([y.shape[1], x.shape[1]], dim=1)
    results = []
    for stream, s, o, m in zip((block.y, block.x), (y, x), out, mods, strict=True):
        if block.ends and stream is block.y:
            results.append(s)
            continue
        proj, mlp = stream.attn.part.proj, stream.ffn.part
        s = s + m[2] * (o @ proj.weight.T + proj.bias)
        if "attn2" in stream.order:
            before = x if stream is block.x else y
            h = F.layer_norm(before, (DIM,), eps=1e-6) * (1 + m[4]) + m[3]
            s = s + m[5] * stream.attn2.part(h, Context(rope=rope))
        h = F.layer_norm(s, (DIM,), eps=1e-6) * (1 + m[-2]) + m[-3]
        results.append(s + m[-1] * mlp(h))
    return results[1], results[0]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize(("qk_norm", "dual"), [("", 0), ("layer", 0), ("rms", 0), ("rms", 1)])
def test_the_block_is_its_equation(
    ends: bool, masked: bool, placed: bool, qk_norm: Any, dual: int
) -> None:
    attn = {"name": "softmax", "qk_norm": bool(qk_norm)}
    block = build(attn, ends=ends, dual=dual, norm=NormRule(qk_kind=qk_norm or None))
    x, y, ctx = inputs()
    mask = torch.tensor([[True, True, False, False], [True] * 4]) if masked else None
    rope = table(N) if placed else None
    grads = []
    for slow in (True, False):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        block.zero_grad()
        if slow:
            assert ctx.cond is not None
            out = obvious(block, a, b, ctx.cond, mask, rope)
        else:
            out = block(a, b, replace(ctx, rope=rope), replace(ctx, mask=mask))
        (out[0].square().sum() + out[1].sin().sum()).backward()
        weights = {n: p.grad for n, p in block.named_parameters()}
        grads.append((*out, a.grad, b.grad, weights))
    torch.testing.assert_close(grads[1], grads[0])


def test_a_stream_that_ends_has_fewer_weights() -> None:
    names = {n for n, _ in build(ends=True).y.named_parameters()}
    assert names == {
        "modulation.linear.weight", "modulation.linear.bias",
        "attn.part.qkv.weight", "attn.part.qkv.bias",
    }  # fmt: skip
    assert build(ends=True).y.modulation.linear.out_features == 2 * DIM


@pytest.mark.parametrize("core", CORES)
def test_every_order_free_core_mixes_both_streams(core: str) -> None:
    """It is the attention over one row whose tokens were projected by two sets of weights."""
    block = build(core, cond=False)
    x, y, _ = inputs()
    one = Attention(resolve("attention", core), Site(dim=DIM, heads=HEADS)).double().eval()
    one.core = block.core
    for stream in (block.x, block.y):  # both streams alike: one attention says what must come out
        stream.attn.part.load_state_dict(
            {k: v for k, v in one.state_dict().items() if not k.startswith("core.")}
        )
    out = one(torch.cat([block.y.attn.norm(y), block.x.attn.norm(x)], dim=1))
    a, b = block(x, y)
    for s, o, stream, got in ((y, out[:, :M], block.y, b), (x, out[:, M:], block.x, a)):
        s = s + o
        torch.testing.assert_close(got, s + stream.ffn.part(stream.ffn.norm(s)))


@pytest.mark.parametrize(("core", "placed"), PLACED)
@pytest.mark.parametrize("gated", [False, True])
def test_padding_of_either_stream_changes_nothing(core: str, placed: bool, gated: bool) -> None:
    block = _gated(attn=core) if gated else build(core)
    x, y, ctx = inputs(1)
    places = {n: replace(ctx, rope=table(n) if placed else None) for n in (N, N + 3)}
    a, b = block(x, y, places[N], ctx)
    more = [F.pad(s, (0, 0, 0, 3), value=5.0) for s in (x, y)]
    masks = [torch.arange(s.shape[1])[None] < n for s, n in zip(more, (N, M), strict=True)]
    far = [replace(c, mask=m) for c, m in zip((places[N + 3], ctx), masks, strict=True)]
    c, d = block(*more, *far)
    torch.testing.assert_close((c[:, :N], d[:, :M]), (a, b), rtol=1e-6, atol=1e-7)
    e, f = block(x, more[1], places[N], far[1])
    torch.testing.assert_close((e, f[:, :M]), (a, b), rtol=1e-6, atol=1e-7)


LENGTHS = {"x": [7, 3, 7, 1], "y": [4, 4, 0, 2]}


@pytest.mark.parametrize(("core", "placed"), PLACED)
@pytest.mark.parametrize("which", ["x", "y", "xy"])
@pytest.mark.parametrize("gated", [False, True])
def test_packed_equals_looped(core: str, which: str, placed: bool, gated: bool) -> None:
    block = _gated(attn=core) if gated else build(core)
    x, y, ctx = inputs(4)
    given, ctxs, real = {"x": x, "y": y}, {}, {}
    for name, s in given.items():
        mask = torch.arange(s.shape[1])[None] < torch.tensor(LENGTHS[name])[:, None]
        if name not in which:
            mask = torch.ones_like(mask)
        real[name] = mask.sum(1).tolist()
        packing = Packing.from_mask(mask) if name in which else None
        rope = table(s.shape[1]) if placed and name == "x" else None
        if rope is not None and packing is not None:
            rope = rope.tokens(packing.positions)
        ctxs[name] = replace(ctx, packing=packing, rope=rope)
        if packing is not None:
            given[name] = packing.pack(s)
    out = dict(zip("xy", block(*given.values(), *ctxs.values()), strict=True))
    for name in which:
        out[name] = ctxs[name].packing.unpack(out[name])
    for i in range(4):
        alone = ctx.rows(torch.tensor([i]))
        n, m = real["x"][i], real["y"][i]
        rope = table(n) if placed else None
        a, b = block(x[i : i + 1, :n], y[i : i + 1, :m], replace(alone, rope=rope), alone)
        torch.testing.assert_close(out["x"][i : i + 1, :n], a, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out["y"][i : i + 1, :m], b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("core", CORES)
def test_tables_of_one_stream_are_those_of_both_with_still_tokens(core: str) -> None:
    block = build(core)
    x, y, ctx = inputs()
    still = Rope(*torch.stack([torch.ones(M, 8), torch.zeros(M, 8)]).double(), interleaved=True)
    a = block(x, y, replace(ctx, rope=table(N)), ctx)
    b = block(x, y, replace(ctx, rope=table(N)), replace(ctx, rope=still))
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a[0], block(x, y, ctx, ctx)[0])


@pytest.mark.parametrize("core", ["softmax", "flow", "linear"])
def test_every_token_may_have_a_place(core: str) -> None:
    """As FLUX has them: a shift of all places means nothing, one of a single stream does."""
    block, both = build(core), table(N + M + 1)
    x, y, ctx = inputs()

    def run(start: int, far: int) -> Any:
        x_rope, y_rope = both.tokens(slice(start, start + N)), both.tokens(slice(far, far + M))
        return block(x, y, replace(ctx, rope=x_rope), replace(ctx, rope=y_rope))

    out = run(M, 0)
    torch.testing.assert_close(run(M + 1, 1), out, rtol=1e-4, atol=1e-5)  # angles are float32
    assert not torch.allclose(run(M + 1, 0)[0], out[0])


def test_text_tokens_are_a_set() -> None:
    block = build()
    x, y, ctx = inputs()
    order = torch.tensor([2, 0, 3, 1])
    a, b = block(x, y, replace(ctx, rope=table(N)), ctx)
    c, d = block(x, y[:, order], replace(ctx, rope=table(N)), ctx)
    torch.testing.assert_close((c, d), (a, b[:, order]))


def _silenced(block: Joint, heads: list[int]) -> Joint:
    """The columns of the output projections that read these heads are zero."""
    with torch.no_grad():
        for stream in (block.x, block.y):
            if stream.attn.part.closes:
                columns = stream.attn.part.proj.weight.unflatten(1, (HEADS, -1))
                columns[:, heads] = 0
    return block


@pytest.mark.parametrize("core", ROWS)
@pytest.mark.parametrize("ends", [False, True])
def test_selected_heads_are_the_block_without_the_others(core: str, ends: bool) -> None:
    block = build({"name": core, "qk_norm": True}, ends=ends)
    x, y, ctx = inputs()
    small = block.select(torch.tensor([0, 2]))
    placed = replace(ctx, rope=table(N) if registry.core.get(core).caps.rope else None)
    out = small(x, y, placed, ctx)
    full = _silenced(block, [1])(x, y, placed, ctx)
    torch.testing.assert_close(out, full)
    assert small.macs(N, M) < block.macs(N, M)
    assert small.units == 2
    assert block.units == 3
    order = torch.tensor([2, 0, 1])
    turned = block.select(order)
    torch.testing.assert_close(turned.magnitudes(), block.magnitudes()[order])
    torch.testing.assert_close(turned(x, y, ctx, ctx), block(x, y, ctx, ctx))


def test_heads_that_cannot_be_cut_say_so() -> None:
    with pytest.raises(CapabilityError, match="share a key"):
        build({"name": "softmax", "kv_heads": 1}).select(torch.tensor([0]))
    gated = build(width="dynamic")
    assert gated.select(torch.tensor([1, 0, 2])).units == 3
    with pytest.raises(CapabilityError, match="gates over time"):
        gated.select(torch.tensor([0]))


def _gated(seed: int = 0, *, attn: str = "softmax") -> Joint:
    """Some gates open, some closed."""
    block = build(attn, width="dynamic", tokens="dynamic")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if ".gates." in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return block


def test_one_gate_switches_a_head_in_both_streams() -> None:
    for seed in range(4):
        block = _gated(seed)
        x, y, ctx = inputs(3)
        torch.testing.assert_close(
            block(x, y, ctx, ctx), block(x, y, *[replace(ctx, tap=Tap())] * 2)
        )
        one = replace(ctx, time=ctx.time[:1].expand(3, -1))  # type: ignore[index]
        closed = (block.x.width("attn", one)[0] == 0).nonzero().flatten().tolist()
        a = block(x, y, one, one)
        block.x.width.gates["attn"] = torch.nn.Identity()
        del block.x.width.gates["attn"]
        torch.testing.assert_close(_silenced(block, closed)(x, y, one, one), a)


def test_gated_work_is_reported_for_heads_and_core() -> None:
    block, ledger = _gated(), Ledger()
    x, y, ctx = inputs()
    given = replace(ctx, ledger=ledger)
    block(x, y, given, given)
    assert set(ledger.shares) == {"b.x.attn", "b.y.attn", "b.core", "b.x.ffn", "b.y.ffn"}
    gates = sum(s.width.macs() + s.tokens.macs(n) for s, n in ((block.x, N), (block.y, M)))
    modulation = 2 * 6 * DIM * DIM
    total = sum(share.cost for share in ledger.shares.values())
    assert total + gates + modulation == block.macs(N, M)
    row = replace(given, packing=Packing.from_mask(torch.ones(2, M, dtype=torch.bool)))
    packed = Ledger()
    block(x, y.flatten(0, 1)[None], replace(given, ledger=packed), replace(row, ledger=packed))
    for path in ("b.x.attn", "b.y.attn", "b.core"):
        assert packed.shares[path].cost == 2 * ledger.shares[path].cost
    complete = replace(given, ledger=(silent := Ledger()), complete=True)
    block(x, y, complete, complete)
    assert not silent.executed


@pytest.mark.parametrize("projections", [None, {}])
def test_adaptive_streams_report_what_they_run(projections: Any) -> None:
    attn = {"name": "softmax", "projections": projections}
    block, ledger = build(attn, {"name": "acm", "learners": 4}), Ledger()
    x, y, ctx = inputs()
    given = replace(ctx, ledger=ledger)
    block(x, y, given, given)
    places = {"b.x.ffn", "b.y.ffn"} | ({"b.x.attn", "b.y.attn"} if projections == {} else set())
    assert set(ledger.executed) == places
    assert all((share >= 0).all() and (share <= 1).all() for share in ledger.executed.values())


def test_taps_see_both_streams() -> None:
    block = build()
    x, y, ctx = inputs()
    tap = Tap(keep=("*",))
    given = replace(ctx, tap=tap)
    block(x, y, given, given)
    streams = {f"b.{s}.{p}" for s in "xy" for p in ("attn", "ffn", "attn.q", "attn.k", "attn.v")}
    assert set(tap.seen) == streams
    assert tap.seen["b.y.attn.k"].shape == (2, HEADS, M, DIM // HEADS)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"merging": Merging(tokens=N)}, "ctx.merging"),
        ({"stream": Stream({})}, "ctx.stream"),
        ({"mask": torch.ones(2, 1, N, N, dtype=torch.bool)}, r"takes a key mask \(B, N\)"),
        ({"memory": torch.zeros(2, 3, DIM)}, "built for self-attention"),
    ],
)
def test_what_two_streams_cannot_honour_is_refused(fields: dict[str, Any], match: str) -> None:
    x, y, ctx = inputs()
    with pytest.raises(CapabilityError, match=match):
        build()(x, y, replace(ctx, **fields), ctx)


def test_packing_and_masks_do_not_mix() -> None:
    x, y, ctx = inputs()
    packing = Packing.from_mask(torch.ones(2, M, dtype=torch.bool))
    mask = torch.ones(2, N, dtype=torch.bool)
    with pytest.raises(CapabilityError, match="goes with no mask"):
        build()(x, packing.pack(y), replace(ctx, mask=mask), replace(ctx, packing=packing))
    other = Packing.from_mask(torch.ones(1, N, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 and 1 samples"):
        Packing.joined(packing, other)


def test_tables_of_two_kinds_do_not_mix() -> None:
    halves = replace(table(M), interleaved=False)
    with pytest.raises(ValueError, match="do not mix"):
        Rope.joined([halves, table(N)], [M, N], like=torch.zeros(1, 8))


def _stack(joint: bool, **parts: Any) -> Any:
    options = {"dim": DIM, "depth": 2, "heads": HEADS, "block": "joint", **parts}
    site = Site(dim=DIM, heads=HEADS, cond_dim=DIM, time_dim=DIM, norm=NormRule(affine=False))
    needs = Needs(joint=joint)
    return build_stack(BackboneConfig.from_dict(options), site, needs, name="toy")


def test_stacks_of_two_streams_end_the_second() -> None:
    blocks = _stack(True, layers={"0": {"attn": "flow", "ffn": "swiglu"}})
    assert [block.ends for block in blocks] == [False, True]
    assert [block.core.config.entry.name for block in blocks] == ["flow", "softmax"]
    assert not _stack(True, block={"name": "joint", "ends": False})[1].ends


@pytest.mark.parametrize(
    ("joint", "parts", "match"),
    [
        (False, {}, r"'joint' has two streams, and this model one; choices: .*adaln-zero"),
        (
            True,
            {"block": "adaln-zero"},
            r"'adaln-zero' has one stream; choices: expert-adaln, joint",
        ),
        (True, {"attn": "lmu"}, r"choices: .*flow.*softmax"),
        (True, {"attn": "longformer"}, r"two streams.*; choices: .*flow"),
        (True, {"axes": "hw"}, "axes"),
        (True, {"block": {"name": "iterate", "body": "joint"}}, "the block around it one"),
        (True, {"tokens": "tome"}, "two streams share one; choices: None"),
    ],
)
def test_models_and_blocks_agree_on_the_streams(
    joint: bool, parts: dict[str, Any], match: str
) -> None:
    with pytest.raises((CapabilityError, ValueError), match=match):
        _stack(joint, **parts)


def test_another_mixer_is_refused_alone() -> None:
    site = Site(dim=DIM, heads=HEADS, path="b")
    with pytest.raises(
        CapabilityError, match=r"b: 'tdsm of softmax' has no queries.*choices: .*softmax"
    ):
        Joint.Config().build(site, attn=resolve("attention", "tdsm"), ffn=None)
    plain = Joint.Config(ends=False).build(site, attn=Attention.Config(), ffn=None)
    x, y, _ = inputs()
    assert plain.double()(x, y)[1].shape == y.shape


@pytest.mark.parametrize(
    "slots", [{}, {"width": "dynamic", "tokens": "dynamic"}], ids=["", "gated"]
)
def test_a_second_attention_is_masked_packed_and_reported(slots: dict[str, str]) -> None:
    block = build(dual=1, **slots)
    x, y, ctx = inputs(3)
    tap, ledger = Tap(keep=("*",)), Ledger()
    lengths = torch.tensor([N, 2, 5])
    mask = torch.arange(N) < lengths[:, None]
    packing, words = Packing.from_mask(mask), Packing.from_mask(torch.ones(3, M, dtype=torch.bool))
    padded = block(x, y, replace(ctx, mask=mask), ctx)[0]
    row, _ = block(
        packing.pack(x), words.pack(y), replace(ctx, packing=packing), replace(ctx, packing=words)
    )
    torch.testing.assert_close(row, packing.pack(padded), rtol=1e-6, atol=1e-7)
    tapped = replace(ctx, tap=tap, ledger=ledger)
    block(x, y, tapped, tapped)
    assert {"b.x.attn2", "b.x.attn2.q"} <= set(tap.seen)
    assert ("b.x.attn2" in ledger.shares) == bool(slots)
    assert block.macs(N, M) - build(**slots).macs(N, M) == (
        block.x.attn2.part.macs(N)
        + 3 * DIM * DIM  # its modulation
        + (block.x.width.gates["attn2"].macs() if slots else 0)
    )


def test_a_second_attention_is_there_in_the_first_blocks() -> None:
    blocks = _stack(True, block={"name": "joint", "dual": 1})
    assert [block.x.order for block in blocks] == [("attn", "attn2", "ffn"), ("attn", "ffn")]
    assert not any("attn2" in block.y.order for block in blocks)
