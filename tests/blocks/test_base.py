"""Blocks as lists of branches: order, modulation, what each branch sees, streaming."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import effformer
from effformer import registry
from effformer.attention import Attention, Mixer, Softmax
from effformer.blocks import AdaLNSingle, AdaLNZero, Block, Macaron, PostNorm, PreNorm
from effformer.checks import CapabilityError
from effformer.config import resolve
from effformer.context import EMPTY, Context, Rope, Stream, Tap
from effformer.ffn import FFN, MLP
from effformer.site import NormRule, Site

PLAIN: list[type[Any]] = [PreNorm, PostNorm, Macaron]
DIM = 12


def build(kind: type[Any], *, attn: str = "softmax", cross: bool = False, **site: Any) -> Block:
    parts: dict[str, Any] = {"attn": resolve("attention", attn), "ffn": MLP.Config()}
    if cross:
        parts["cross"] = Attention.Config()
        site.setdefault("memory_dim", 5)
    block: Block = kind(kind.Config(), Site(dim=DIM, heads=3, path="b", **site), **parts)
    return block.eval()


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        (PreNorm, ("attn", "cross", "ffn")),
        (PostNorm, ("attn", "cross", "ffn")),
        (Macaron, ("ffn1", "attn", "cross", "ffn2")),
    ],
)
def test_order_of_branches(kind: type[Any], order: tuple[str, ...]) -> None:
    assert build(kind, cross=True).order == order
    assert build(kind).order == tuple(name for name in order if name != "cross")


@pytest.mark.parametrize("kind", PLAIN)
def test_each_attention_sees_its_own_tokens_and_mask(kind: type[Any]) -> None:
    block = build(kind, cross=True)
    x, memory = torch.randn(2, 6, DIM), torch.randn(2, 4, 5)
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    far = torch.arange(4) < torch.tensor([[2], [4]])
    y = block(x, Context(memory=memory, mask=mask, memory_mask=far))
    unseen = torch.where(far.unsqueeze(-1), memory, torch.randn(2, 4, 5))
    same = block(x, Context(memory=unseen, mask=mask, memory_mask=far))
    torch.testing.assert_close(same, y, rtol=1e-5, atol=1e-6)
    short = block(x[1:, :3], Context(memory=memory[1:], memory_mask=far[1:]))
    torch.testing.assert_close(y[1:, :3], short, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(block(x, Context(memory=memory, mask=mask)), y)


def test_a_memory_needs_a_branch_that_reads_it() -> None:
    x, memory = torch.randn(1, 3, DIM), torch.randn(1, 2, DIM)
    with pytest.raises(CapabilityError, match=r"b\.attn: built for self-attention"):
        build(PreNorm)(x, Context(memory=memory))
    with pytest.raises(CapabilityError, match="memory_mask is about a memory"):
        build(PreNorm)(x, Context(memory_mask=torch.ones(1, 2, dtype=torch.bool)))
    with pytest.raises(CapabilityError, match=r"b\.cross: built for cross-attention"):
        build(PreNorm, cross=True)(x)


def over_two(kind: type[Any]) -> tuple[Block, Tensor, Context]:
    """A block with a branch over each of two memories, and what it is called with."""
    cond = {"cond_dim": 6 * DIM} if kind is AdaLNSingle else {}
    block = build(kind, cross=True, memory_dim=(5, 7), **cond)
    far = torch.tensor([[True, True, False], [True, False, True]])
    ctx = Context(
        memory=(torch.randn(2, 4, 5), torch.randn(2, 3, 7)), memory_mask=(None, far),
        cond=torch.randn(2, 6 * DIM) if cond else None,
    )  # fmt: skip
    return block, torch.randn(2, 6, DIM), ctx


@pytest.mark.parametrize("kind", [PreNorm, Macaron, AdaLNSingle])
@torch.no_grad()
def test_branches_over_several_memories_run_side_by_side(kind: type[Any]) -> None:
    block, x, ctx = over_two(kind)
    first = block.order.index("cross")
    assert block.order[first - 1 : first + 2] == ("attn", "cross", "cross_2")
    expected = x
    for name, branch in zip(block.order, block.branches, strict=True):
        if name.startswith("cross"):
            expected = expected + branch.part(branch.norm(x), branch.view(ctx))
            continue
        for p in branch.part.parameters():  # the others add nothing
            p.zero_()
    torch.testing.assert_close(block(x, ctx), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_with_norms_behind_the_sums_memories_follow_each_other() -> None:
    block, x, ctx = over_two(PostNorm)
    expected = x
    for branch in block.branches:
        expected = branch(expected, branch.view(ctx))
    assert torch.equal(block(x, ctx), expected)


def test_memories_are_those_that_the_block_attends_to() -> None:
    block, x, ctx = over_two(PreNorm)
    first, second = ctx.memory
    for bad, message in (
        (
            first,
            r"b\.cross: the block attends to 2 memories, and ctx\.memory holds 1; give a tuple of 2",
        ),
        ((first, second, second), "holds 3; give a tuple of 2"),
    ):
        with pytest.raises(CapabilityError, match=message):
            block(x, Context(memory=bad))
    with pytest.raises(CapabilityError, match=r"holds 2; give one tensor"):
        build(PreNorm, cross=True)(x, Context(memory=(first, first)))
    with pytest.raises(
        CapabilityError, match=r"attends to one memory, but ctx\.memory holds 2; a block"
    ):
        block.cross.part(x, ctx)
    with pytest.raises(ValueError, match=r"b\.cross_2: memory has shape .* width must be 7"):
        block(x, Context(memory=(first, first)))
    angles = Rope(
        torch.ones(1, 6, 4), torch.zeros(1, 6, 4), torch.ones(1, 4, 4), torch.zeros(1, 4, 4)
    )
    with pytest.raises(CapabilityError, match="rotary tables for keys belong to one memory"):
        block(x, replace(ctx, rope=angles))
    with pytest.raises(ValueError, match=r"names 2 memories, and an attention looks at one"):
        Attention(Attention.Config(), Site(dim=DIM, heads=3, memory_dim=(5, 7)))


@pytest.mark.parametrize("kind", [AdaLNZero, Macaron])
def test_conditioned_blocks_start_as_the_identity(kind: type[Any]) -> None:
    block = build(kind, cond_dim=7)
    x, cond = torch.randn(2, 5, DIM), torch.randn(2, 7)
    torch.testing.assert_close(block(x, Context(cond=cond)), x, rtol=0, atol=0)
    assert block.modulation.linear.out_features == 3 * len(block.order) * DIM
    with pytest.raises(ValueError, match=r"b: ctx\.cond is None, but the block is modulated"):
        block(x)


def test_modulation_shifts_scales_and_gates() -> None:
    block = build(AdaLNZero, cond_dim=7)
    torch.nn.init.normal_(block.modulation.linear.weight)
    x, ctx = torch.randn(2, 5, DIM), Context(cond=torch.randn(2, 7))
    mods = block.modulations(ctx)
    y = x
    for i, branch in enumerate(block.branches):
        shift, scale, gate = mods[3 * i : 3 * i + 3]
        h = torch.nn.functional.layer_norm(y, (DIM,), eps=1e-6) * (1 + scale) + shift
        y = y + gate * branch.part(h, EMPTY)
    torch.testing.assert_close(block(x, ctx), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PLAIN)
def test_taps_read_every_branch(kind: type[Any]) -> None:
    block, tap = build(kind, cross=True), Tap(keep=("b.*",))
    block(torch.randn(1, 3, DIM), Context(memory=torch.randn(1, 2, 5), tap=tap))
    assert {f"b.{name}" for name in block.order} <= set(tap.seen)


def test_layer_scale_on_chosen_branches() -> None:
    site = Site(dim=DIM, heads=3, layer_scale=0.5)
    parts: dict[str, Any] = {"attn": Attention.Config(), "ffn": MLP.Config()}
    for attn, ffn in [(True, True), (True, False), (False, True)]:
        block = PreNorm(PreNorm.Config(scale_attn=attn, scale_ffn=ffn), site, **parts)
        names = {n.split(".")[0] for n, _ in block.named_parameters() if "layer_scale" in n}
        assert names == {n for n, on in (("attn", attn), ("ffn", ffn)) if on}
    x = torch.randn(1, 3, DIM)
    branch = PreNorm(PreNorm.Config(), site, **parts).eval().ffn
    torch.testing.assert_close(branch(x, EMPTY), x + 0.5 * branch.part(branch.norm(x)))


def test_macs_of_a_decoder_block() -> None:
    block = build(PreNorm, cross=True)
    parts: dict[str, Any] = {name: getattr(block, name).part for name in block.order}
    total = parts["attn"].macs(6) + parts["cross"].macs(6, 4) + parts["ffn"].macs(6)
    assert block.macs(6, 4) == total


class Mean(Mixer):
    """A token mixer without a streaming form."""

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        return x.mean(dim=1, keepdim=True).expand_as(x)

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        return 0


def test_streams_are_refused_by_parts_that_cannot() -> None:
    block = build(PreNorm)
    block.attn.part = Mean(Softmax.Config(), block.site)
    with pytest.raises(CapabilityError, match=r"b\.attn: this token mixer cannot stream; choices"):
        block(torch.randn(1, 2, DIM), Context(stream=Stream({})))


def test_streaming_takes_no_mask() -> None:
    mixer = Attention(Attention.Config(core=Softmax.Config(causal=True)), Site(dim=DIM, heads=3))
    x = torch.randn(1, 2, DIM)
    state = mixer.init_state(1, like=x)
    with pytest.raises(CapabilityError, match="streaming takes no mask"):
        mixer.step(x, state, Context(mask=torch.ones(1, 2, dtype=torch.bool)))


def _with_ffn_eps(name: str, eps: float | None) -> Block:
    caps = registry.block.get(name).caps
    cond = DIM if caps.cond != "never" else None
    site = Site(
        dim=DIM, heads=3, cond_dim=cond, time_dim=cond, length=6, path="b",
        norm=NormRule(ffn_eps=eps),
    )  # fmt: skip
    torch.manual_seed(0)
    block: Block = resolve("block", name).build(
        site, attn=resolve("attention", "softmax"), ffn=MLP.Config()
    )
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return block.eval()


def test_streams_use_an_epsilon_before_ffns() -> None:
    block = _with_ffn_eps("joint", 0.5)
    eps = {type(b.part).__name__: b.norm.eps for b in block.branches}
    assert eps == {"Heads": 1e-6, "MLP": 0.5}


@pytest.mark.parametrize("name", registry.block.names(joint=False))
def test_an_epsilon_before_ffns_is_used_or_refused(name: str) -> None:
    x = torch.randn(2, 6, DIM)
    ctx = Context(cond=torch.randn(2, DIM), time=torch.randn(2, DIM))
    plain = _with_ffn_eps(name, None)
    same = _with_ffn_eps(name, 1e-6)
    torch.testing.assert_close(same(x, ctx), plain(x, ctx), rtol=0, atol=0)
    if plain.SHARED_NORM:
        with pytest.raises(
            CapabilityError, match=rf"b: '{name}' has .* \(1e-06 would do\); cho"
        ) as e:
            _with_ffn_eps(name, 0.5)
        for able in str(e.value).partition("choices: ")[2].split(", "):
            assert _with_ffn_eps(able, 0.5)
        return
    block = _with_ffn_eps(name, 0.5)
    for branch in block.branches:
        assert branch.norm.eps == (0.5 if isinstance(branch.part, FFN) else 1e-6)
    out, expected = block(x, ctx).detach(), plain(x, ctx).detach()
    assert float((out - expected).abs().max()) > 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("block", ["adaln-zero", "macaron", "parallel", "iterate"])
def test_models_say_which_blocks_cannot(block: str) -> None:
    options: dict[str, Any] = {"block": block, "ffn_norm_eps": 1e-5}
    if block != "parallel":
        norms = [
            b.norm.eps for b in effformer.build_model("dit-nano", **options).blocks[0].branches
        ]
        assert norms == ([1e-5, 1e-6, 1e-5] if block == "macaron" else [1e-6, 1e-5])
        return
    with pytest.raises(
        CapabilityError, match=r"one norm for attention and FFN.*choices: adaln-single, adaln-zero"
    ):
        effformer.build_model("dit-nano", **options)
