"""Blocks of LMUFormer, dense and spiking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import effformer
from effformer.blocks import LMUBlock, SpikingLMUBlock, init_states
from effformer.checks import CapabilityError
from effformer.config import resolve
from effformer.context import Context, Packing, Stream
from effformer.nn.lif import LIF
from effformer.site import Site

SITE = Site(dim=8, heads=2, path="b")
FIRE = {"lif": {"threshold": 0.4}}
PARTS: dict[str, dict[str, Any]] = {
    "lmu": {"attn": {"name": "lmu", "theta": 6.0}, "ffn": "conv-channel"},
    "spiking-lmu": {
        "attn": {"name": "spiking-lmu", "theta": 6.0, **FIRE},
        "ffn": {"name": "spiking-conv-channel", **FIRE},
    },
}


def build(name: str) -> Any:
    cls = {"lmu": LMUBlock, "spiking-lmu": SpikingLMUBlock}[name]
    attn, ffn = (resolve(k, PARTS[name][s]) for k, s in (("attention", "attn"), ("ffn", "ffn")))
    block = cls(resolve("block", name), SITE, attn=attn, ffn=ffn)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(mean=0.3 if p.dim() == 1 else 0.0, std=0.4)
        for _ in range(40):
            block(torch.randn(4, 20, 8))
    return block.eval()


def test_the_dense_block_written_out() -> None:
    block, x = build("lmu"), torch.randn(2, 9, 8)
    h = x + block.attn.norm(block.attn.part(x))
    torch.testing.assert_close(block(x), h + block.ffn.norm(block.ffn.part(h)).relu())


def test_the_spiking_block_written_out() -> None:
    block, x = build("spiking-lmu"), torch.randn(2, 9, 8)
    first, _ = LIF(LIF.Config(threshold=0.5))(block.attn.norm(x))
    h = x + block.attn.close(block.attn.part(first))
    second, _ = LIF(LIF.Config())(block.ffn.norm(h))
    torch.testing.assert_close(block(x), h + block.ffn.part(second))
    for spikes in (first, second):
        assert 0 < spikes.mean() < 1


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6]])
@pytest.mark.parametrize("name", PARTS)
def test_blocks_stream(name: str, pieces: list[int]) -> None:
    # in double precision no spike turns on a rounding error
    block, x = build(name).double(), torch.randn(2, 12, 8, dtype=torch.float64)
    states, outputs = init_states(block, 2, like=x), []
    for piece in x.split(pieces, dim=1):
        stream = Stream(states)
        outputs.append(block(piece, Context(stream=stream)))
        states = stream.after
    torch.testing.assert_close(torch.cat(outputs, dim=1), block(x), rtol=1e-9, atol=1e-9)
    keys = {"lmu": {"b.attn"}, "spiking-lmu": {"b.attn", "b.attn.lif", "b.ffn", "b.ffn.lif"}}
    assert set(states) == keys[name]


def test_spikes_and_padding() -> None:
    block, x = build("spiking-lmu"), torch.randn(1, 5, 8)
    mask = torch.ones(1, 5, dtype=torch.bool)
    for ctx in (Context(mask=mask), Context(packing=Packing.from_mask(mask))):
        with pytest.raises(CapabilityError, match=r"neurons charge on padding.*choices.*prenorm"):
            block(x, ctx)


def test_models_that_attend_both_ways_refuse_carried_states() -> None:
    words = r"'{}' carries a state from token to token, but this model attends both ways; choices"
    with pytest.raises(CapabilityError, match=words.format("spiking-lmu")):
        effformer.build_model("vit-nano", block="spiking-lmu")
    with pytest.raises(CapabilityError, match=words.format("spiking-conv-channel")):
        effformer.build_model("vit-nano", ffn="spiking-conv-channel")
    assert isinstance(effformer.build_model("vit-nano", block="lmu", ffn="conv-channel"), nn.Module)


def test_a_spiking_language_model_streams() -> None:
    model = effformer.build_model(
        "flowformer-gpt-nano", vocab=31, context=24, dim=24, depth=2,
        block="spiking-lmu", **PARTS["spiking-lmu"],
    )  # fmt: skip
    ids = torch.randint(0, 31, (2, 12))
    with torch.no_grad():
        for _ in range(40):
            model(ids)
    model.double().eval()
    state, outputs = model.init_state(2), []
    for piece in ids.split([5, 1, 6], dim=1):
        out, state = model.step(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), model(ids), rtol=1e-9, atol=1e-9)


def test_blocks_that_need_heads_say_so() -> None:
    words = r"block: 'flowtransformer-decoder' needs queries, keys .* 'lmu' has not; choices: .*lmu"
    with pytest.raises(CapabilityError, match=words):
        effformer.build_model("lmuformer-tiny", block="flowtransformer-decoder")
