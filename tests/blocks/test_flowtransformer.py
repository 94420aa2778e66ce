"""FlowTransformer's blocks against their equations, alone and in models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effformer.models import FlowformerGPT
from effformer.models.layouts.flowtransformer import ATTENTION, decoder_layout, encoder_layout
from torch import Tensor
from torch.nn import functional as F

import effformer
from effformer import registry
from effformer.attention import Attention, Softmax
from effformer.blocks import Block, FlowTransformerDecoder, FlowTransformerEncoder
from effformer.checks import CapabilityError, FormatError
from effformer.config import resolve
from effformer.context import Context, Packing, Rope, Stream
from effformer.ffn import MLP
from effformer.site import Site

DIM, HEADS, INNER = 12, 3, 7
KINDS = [FlowTransformerEncoder, FlowTransformerDecoder]
MASKED_CORES = registry.core.names(mask="key", axes=False)


def build(kind: type[Any], attn: Any = "softmax", **site: Any) -> Any:
    options = {"linformer": {"tokens": 16}, "longformer": {"window": 4}}
    if isinstance(attn, str):
        attn = resolve("attention", {"name": attn, **options.get(attn, {})})
    ffn = MLP.Config(hidden=INNER, act="relu")
    place = Site(dim=DIM, heads=HEADS, path="b", **site)
    block = kind(kind.Config(), place, attn=attn, ffn=ffn)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return block.eval()


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head and token by token."""
    out = torch.zeros_like(q)
    width = DIM // HEADS
    for h in range(HEADS):
        cols = slice(h * width, (h + 1) * width)
        for n in range(q.shape[1]):
            scores = torch.stack([(q[:, n, cols] * k[:, m, cols]).sum(-1) for m in range(5)], -1)
            weights = (scores * width**-0.5).softmax(-1)
            out[:, n, cols] = sum(weights[:, m : m + 1] * v[:, m, cols] for m in range(5))
    return out


def _norm(branch: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, (DIM,), branch.norm.weight, branch.norm.bias, 1e-6)


def _slow_encoder(block: Any, x: Tensor) -> Tensor:
    q, k, v = block.attn.part.qkv(x).chunk(3, -1)
    a = block.attn.part.proj(_attend(q, k, v))
    y = _norm(block.attn, x + a)
    f = F.relu(block.ffn.part.fc2(F.relu(block.ffn.part.fc1(y))))
    return _norm(block.ffn, a + f)


def _slow_decoder(block: Any, x: Tensor) -> Tensor:
    def attn(queries: Tensor) -> Tensor:
        k, v = block.attn.part.kv(x).chunk(2, -1)
        return block.attn.part.proj(_attend(block.attn.part.q(queries), k, v))

    y = _norm(block.attn, x + attn(x))
    z = _norm(block.ffn, y + attn(y))
    return _norm(block.ffn, z + block.ffn.part.fc2(F.relu(block.ffn.part.fc1(z))))


@pytest.mark.parametrize(
    ("kind", "slow"),
    [(FlowTransformerEncoder, _slow_encoder), (FlowTransformerDecoder, _slow_decoder)],
)
def test_equals_the_equation_forward_and_backward(kind: type[Block], slow: Any) -> None:
    block = build(kind).double()
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(block(x), slow(block, x))
    weight = torch.randn(2, 5, DIM, dtype=torch.float64)
    given = [x, *block.parameters()]
    ours = torch.autograd.grad((block(x) * weight).sum(), given)
    theirs = torch.autograd.grad((slow(block, x) * weight).sum(), given)
    torch.testing.assert_close(ours, theirs)


def test_published_number_of_parameters() -> None:
    d, inner, heads = 64, 128, 2
    attn, ffn = Attention.Config(head_dim=inner), MLP.Config(hidden=inner, act="relu")
    site = Site(dim=d, heads=heads)
    block = FlowTransformerEncoder(FlowTransformerEncoder.Config(), site, attn=attn, ffn=ffn)
    projections = 3 * (d * heads * inner + heads * inner) + heads * inner * d + d
    expected = projections + 2 * 2 * d + d * inner + inner + inner * d + d
    assert sum(p.numel() for p in block.parameters()) == expected


def test_a_shared_attention_is_counted_twice() -> None:
    block = build(FlowTransformerDecoder)
    once = block.attn.part.macs(5)
    assert once == 4 * 5 * DIM * DIM + 2 * 5 * 5 * DIM
    assert block.macs(5) == 2 * once + 2 * 5 * DIM * INNER


@pytest.mark.parametrize("kind", KINDS)
def test_not_causal_unless_the_attention_is(kind: type[Block]) -> None:
    x = torch.randn(1, 6, DIM)
    changed = x.clone()
    changed[:, -1] += 1
    for causal in (False, True):
        block = build(kind, Attention.Config(core=Softmax.Config(causal=causal)))
        first = torch.allclose(block(x)[:, 0], block(changed)[:, 0], atol=1e-6)
        assert first == causal


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("core", MASKED_CORES)
def test_padding_changes_nothing(kind: type[Block], core: str) -> None:
    block, x = build(kind, core), torch.randn(2, 9, DIM)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    out = block(x, Context(mask=mask))
    torch.testing.assert_close(out[:1, :6], block(x[:1, :6]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[1:], block(x[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_looped_and_rotary_angles_are_relative(kind: type[Block]) -> None:
    block, x = build(kind), torch.randn(2, 5, DIM)
    packing = Packing.from_mask(torch.arange(5)[None] < torch.tensor([[5], [2]]))
    packed = block(packing.pack(x), Context(packing=packing))
    out = packing.unpack(packed)
    torch.testing.assert_close(out[:1], block(x[:1]))
    torch.testing.assert_close(out[1:, :2], block(x[1:, :2]))

    def turned(start: float) -> Tensor:
        angles = (torch.arange(5) + start)[:, None] * torch.tensor([0.3, 0.7])
        return block(x, Context(rope=Rope(angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))))

    torch.testing.assert_close(turned(0.0), turned(2.5), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(turned(0.0), block(x), atol=1e-3)


def test_the_decoder_refuses_memories_streams_and_mixers_without_queries() -> None:
    block, x = build(FlowTransformerDecoder), torch.randn(1, 4, DIM)
    for ctx in (Context(memory=x), Context(stream=Stream({}))):
        with pytest.raises(
            CapabilityError, match=r"b: this block takes neither a memory nor a stream; .*prenorm"
        ):
            block(x, ctx)
    with pytest.raises(
        CapabilityError, match=r"b\.attn: 'longformer' has no queries .*; choices: .*softmax"
    ):
        build(FlowTransformerDecoder, "longformer")


@pytest.mark.parametrize("name", ["flowtransformer-encoder", "flowtransformer-decoder"])
@pytest.mark.parametrize("core", ["softmax", "flow"])
def test_in_models(name: str, core: str) -> None:
    for preset in ("bert-tiny", "vit-nano", "flowformer-gpt-nano"):
        model = effformer.build_model(preset, block=name, attn=core).eval()
        given = model.example_inputs(2)
        with torch.no_grad():
            result = model(**given)
        out = result if isinstance(result, Tensor) else result[0]
        assert out.isfinite().all()
    with pytest.raises(
        CapabilityError, match=r"cannot use .*; choices: adaln-single, adaln-zero, .*parallel"
    ):
        effformer.build_model("dit-nano", block=name)


@pytest.mark.parametrize("core", ["softmax", "flow"])
def test_the_encoder_streams_in_a_causal_model(core: str) -> None:
    options = {"attn": core, "block": "flowtransformer-encoder"}
    model = effformer.build_model("flowformer-gpt-nano", **options).eval()
    assert isinstance(model, FlowformerGPT)
    tokens = torch.randint(0, 60, (2, 9))
    state, pieces = model.init_state(2), []
    for piece in tokens.split([1, 5, 3], dim=1):
        logits, state = model.step(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-4, atol=1e-5)
    shared = effformer.build_model("flowformer-gpt-nano", block="flowtransformer-decoder")
    assert isinstance(shared, FlowformerGPT)
    with pytest.raises(CapabilityError, match="neither a memory nor a stream"):
        shared.step(tokens, shared.init_state(2))


@pytest.mark.parametrize("kind", KINDS)
def test_keras_layout_round_trip(kind: type[Block]) -> None:
    layout = (encoder_layout if kind is FlowTransformerEncoder else decoder_layout)(HEADS)
    block = build(kind)
    keras = layout.from_ours(block.state_dict(), None)
    assert layout.recognise(keras)
    kernels = {k.rpartition("/")[0].rpartition("/")[2]: v for k, v in keras.items()}
    assert kernels["query"].shape == (HEADS, DIM // HEADS)  # the bias, last of its layer
    renumbered = {k.replace("dense_1/", "dense_9/"): v for k, v in keras.items()}
    renumbered = {f"m/n/{k.replace('dense/', 'dense_8/')}": v for k, v in renumbered.items()}
    again = build(kind)
    effformer.load_weights(again, renumbered, layout)
    x = torch.randn(1, 4, DIM)
    torch.testing.assert_close(again(x), block(x), rtol=0, atol=0)
    foreign = {**keras, "b/odd/kernel": torch.zeros(2, 2), "b/odd/seed": torch.zeros(1)}
    with pytest.raises(FormatError, match="unexpected: b/odd/kernel, b/odd/seed"):
        effformer.load_weights(again, foreign, layout)
    del keras[next(key for key in keras if key.endswith("key/kernel"))]
    with pytest.raises(FormatError, match="missing: attn"):
        effformer.load_weights(again, keras, layout)


def test_layout_of_the_plain_attention() -> None:
    part = Attention(Attention.Config(), Site(dim=DIM, heads=HEADS)).eval()
    keras = ATTENTION.from_ours(part.state_dict(), None)
    assert sorted(keras)[:3] == [
        f"gpt3_attention/dense{s}" for s in ("/bias", "/kernel", "_1/bias")
    ]
    again = Attention(Attention.Config(), Site(dim=DIM, heads=HEADS)).eval()
    effformer.load_weights(again, keras, ATTENTION)
    x = torch.randn(1, 4, DIM)
    torch.testing.assert_close(again(x), part(x), rtol=0, atol=0)
