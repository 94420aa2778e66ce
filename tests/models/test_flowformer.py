"""Flowformer as a language model: sizes, causality, padding, streaming, layouts, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.models.flowformer import PRESETS, FlowformerGPT

import effformer
from effformer import CapabilityError, FormatError

TINY: dict[str, Any] = {"vocab": 31, "context": 24, "dim": 24, "depth": 2, "heads": 3}
MIXERS = ["flow", "linear", "softmax"]


def build(**overrides: Any) -> FlowformerGPT:
    model = effformer.build_model("flowformer-gpt-nano", **{**TINY, **overrides})
    assert isinstance(model, FlowformerGPT)
    return model.eval()


def ids(batch: int = 2, tokens: int = 17) -> torch.Tensor:
    return torch.randint(0, TINY["vocab"], (batch, tokens))


def test_parameters_of_the_published_sizes() -> None:
    with torch.device("meta"):
        for name, preset in PRESETS.items():
            if preset.params is not None:
                model = effformer.build_model(name)
                assert sum(p.numel() for p in model.parameters()) == preset.params
        gpt2 = effformer.build_model("flowformer-gpt2")
    assert gpt2.config.to_dict()["attn"]["core"] == {
        "name": "flow", "causal": True, "kernel": "sigmoid", "clamp": 1.0, "eps": 1e-6,
        "flow_eps": 0.0, "chunk": 128,
    }  # fmt: skip
    body = sum(p.numel() for name, p in gpt2.named_parameters() if name != "head.weight")
    assert body == 124_439_808


def test_initial_values() -> None:
    model = effformer.build_model("flowformer-gpt-micro", vocab=500)
    assert model.blocks[0].attn.part.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].ffn.part.fc2.weight.std().item() == pytest.approx(
        0.02 / 8**0.5, rel=0.05
    )
    assert not model.blocks[0].ffn.part.fc1.bias.any()


@pytest.mark.parametrize("attn", MIXERS)
def test_the_future_changes_nothing(attn: str) -> None:
    model, tokens = build(attn=attn), ids()
    changed = tokens.clone()
    changed[:, 9:] = ids(2, 8)
    torch.testing.assert_close(model(changed)[:, :9], model(tokens)[:, :9], rtol=0, atol=1e-6)


def test_every_parameter_learns() -> None:
    model = build()
    model(ids()).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn", MIXERS)
def test_padded_batch_equals_single_texts(attn: str, side: str) -> None:
    model, tokens = build(attn=attn), ids(2, 11)
    columns = torch.arange(11)
    mask = torch.stack([columns >= 0, columns < 5 if side == "right" else columns >= 6])
    out = model(tokens, mask)
    for row, real, logits in zip(tokens, mask, out, strict=True):
        alone = model(row[real][None])[0]
        torch.testing.assert_close(logits[real], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6], [12]])
@pytest.mark.parametrize("attn", MIXERS)
def test_streaming_equals_forward(attn: str, pieces: list[int]) -> None:
    model, tokens = build(attn=attn, layers={"-1": {"attn": "softmax"}}), ids(2, 12)
    state, outputs = model.init_state(2), []
    for piece in tokens.split(pieces, dim=1):
        out, state = model.step(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), model(tokens), rtol=1e-4, atol=1e-5)
    assert state.position == 12


@pytest.mark.parametrize("block", ["prenorm", "postnorm", "macaron", "parallel", "respost"])
def test_every_block_streams(block: str) -> None:
    model, tokens = build(block=block), ids(1, 6)
    state = model.init_state(1)
    first, state = model.step(tokens[:, :4], state)
    second, _ = model.step(tokens[:, 4:], state)
    torch.testing.assert_close(
        torch.cat([first, second], dim=1), model(tokens), rtol=1e-4, atol=1e-5
    )


def test_a_state_can_be_continued_twice() -> None:
    model, tokens = build(), ids(1, 6)
    _, state = model.step(tokens[:, :4], model.init_state(1))
    once, _ = model.step(tokens[:, 4:], state)
    again, _ = model.step(tokens[:, 4:], state)
    torch.testing.assert_close(once, again, rtol=0, atol=0)


def test_the_flow_state_does_not_grow() -> None:
    model = build()

    def size(state: Any) -> int:
        return sum(x.numel() for mixer in state.mixers.values() for x in mixer.core)

    _, short = model.step(ids(1, 2), model.init_state(1))
    _, long = model.step(ids(1, 20), short)
    assert size(short) == size(long) == size(model.init_state(1))


def test_streaming_is_refused_where_a_part_cannot() -> None:
    with pytest.raises(CapabilityError, match=r"blocks\.0\.attn: streaming needs.*flow, .*linear"):
        build(attn="differential").init_state(1)


def test_bad_input() -> None:
    model = build()
    with pytest.raises(TypeError, match=r"tokens must be int64 ids, got torch\.float32"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"expected shape \(B, N\), got \(3,\)"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="25 tokens, but positions for 24 only"):
        model(ids(1, 25))
    with pytest.raises(ValueError, match=r"mask: expected shape \(1, 3\), got \(1, 4\)"):
        model(ids(1, 3), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask: expected bool, True = may attend"):
        model(ids(1, 3), torch.ones(1, 3))
    _, state = model.step(ids(1, 20), model.init_state(1))
    with pytest.raises(ValueError, match="5 tokens, but positions for 4 only"):
        model.step(ids(1, 5), state)


def test_bad_configs() -> None:
    with pytest.raises(ValueError, match="vocab must be at least 1, got 0"):
        build(vocab=0)
    with pytest.raises(ValueError, match="'contxt'; did you mean 'context'"):
        build(contxt=3)
    with pytest.raises(CapabilityError, match=r"'relative' is not causal.*choices: .*flow"):
        build(attn="relative")


def test_official_layout_round_trip(tmp_path: Path) -> None:
    model, tokens = build(), ids()
    file = effformer.save_weights(model, tmp_path / "gpt.safetensors", layout="official")
    other = build()
    assert effformer.load_weights(other, file).layout == "official"
    torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=0)


def test_official_layout_with_a_missing_projection() -> None:
    model = build()
    state = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    del state["transformer.h.1.attn.key_projection.weight"]
    with pytest.raises(FormatError, match=r"missing: blocks\.1\.attn\.part\.qkv\.weight"):
        effformer.load_weights(model, state)


def test_saves_and_loads(tmp_path: Path) -> None:
    model, tokens = build(layers={"1": {"attn": "softmax", "block": "macaron"}}), ids()
    loaded = effformer.load_model(effformer.save_pretrained(model, tmp_path / "gpt"))
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=0)


@pytest.mark.slow
def test_exports_with_any_batch_and_length() -> None:
    model = build(depth=1)
    inputs = model.example_inputs(2)
    dims = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=24)}}
    program = torch.export.export(model, (), inputs, dynamic_shapes={**dims}, strict=False)
    tokens = ids(3, 7)
    torch.testing.assert_close(program.module()(tokens=tokens), model(tokens), rtol=1e-4, atol=1e-5)
