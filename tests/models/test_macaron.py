"""Macaron Net for translation: sizes, padding, causality, layouts, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.models.macaron import PRESETS, MacaronNet, scaled_tokens

import effformer
from effformer import CapabilityError, FormatError
from effformer.blocks import init_states
from effformer.context import Context, Stream

TINY: dict[str, Any] = {"vocab": 31, "dim": 24, "depth": 2, "heads": 3}
PAD = 1
PLAIN = {"iwslt": 31_545_344, "wmt-base": 44_140_544, "wmt-big": 176_361_472}


def build(**overrides: Any) -> MacaronNet:
    model = effformer.build_model("macaron-tiny", **{**TINY, **overrides})
    assert isinstance(model, MacaronNet)
    return model.eval()


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, TINY["vocab"], (batch, tokens))


def without_table(model: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name != "embed.weight")


@pytest.mark.parametrize("size", PLAIN)
def test_parameters_of_the_published_sizes(size: str) -> None:
    with torch.device("meta"):
        macaron = effformer.build_model(f"macaron-{size}")
        plain = effformer.build_model(f"macaron-{size}", block="prenorm")
        post = effformer.build_model(f"macaron-{size}-postnorm")
    assert without_table(macaron) == PRESETS[f"macaron-{size}"].params
    assert without_table(plain) == PLAIN[size]
    # one more output bias and norm in every block; no final norm behind post-norm stacks
    assert without_table(macaron) - without_table(plain) == 12 * 3 * macaron.config.dim
    assert without_table(macaron) - without_table(post) == 2 * 2 * macaron.config.dim


def test_plain_form_equals_an_ordinary_encoder() -> None:
    model = build(block="prenorm", depth=1, positions="none")
    block = model.encoder.blocks[0]
    layer = torch.nn.TransformerEncoderLayer(
        24, 3, block.ffn.part.hidden, batch_first=True, norm_first=True, dropout=0.0
    ).eval()
    attn, ffn = block.attn, block.ffn
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": attn.part.qkv.weight,
            "self_attn.in_proj_bias": attn.part.qkv.bias,
            "self_attn.out_proj.weight": attn.part.proj.weight,
            "self_attn.out_proj.bias": attn.part.proj.bias,
            "linear1.weight": ffn.part.fc1.weight,
            "linear1.bias": ffn.part.fc1.bias,
            "linear2.weight": ffn.part.fc2.weight,
            "linear2.bias": ffn.part.fc2.bias,
            "norm1.weight": attn.norm.weight,
            "norm1.bias": attn.norm.bias,
            "norm2.weight": ffn.norm.weight,
            "norm2.bias": ffn.norm.bias,
        }
    )
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(block(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn", ["softmax", "linear"])
def test_padding_of_the_source_changes_nothing(attn: str, side: str) -> None:
    model = build(attn=attn, cross=attn, source_padding=side)
    source, target, pad = ids(2, 5), ids(2, 4), torch.full((2, 3), PAD)
    padded = torch.cat([pad, source] if side == "left" else [source, pad], dim=1)
    out = model(source, target)
    torch.testing.assert_close(model(padded, target), out, rtol=1e-4, atol=1e-5)
    mask, junk = padded != PAD, torch.where(padded == PAD, ids(2, 8), padded)
    torch.testing.assert_close(model(junk, target, mask), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attn", ["softmax", "flow"])
def test_padding_of_the_target_changes_nothing(attn: str) -> None:
    source, target, pad = ids(2, 5), ids(2, 4), torch.full((2, 3), PAD)
    right = build(attn=attn)
    out = right(source, torch.cat([target, pad], dim=1))[:, :4]
    torch.testing.assert_close(out, right(source, target), rtol=1e-4, atol=1e-5)
    left = build(attn=attn, target_padding="left")
    padded = torch.cat([pad, target], dim=1)
    out = left(source, padded, target_mask=padded != PAD)[:, 3:]
    torch.testing.assert_close(out, left(source, target), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attn", ["softmax", "flow", "linear", "differential"])
@pytest.mark.parametrize("block", ["macaron", "prenorm", "postnorm"])
def test_the_future_of_the_target_changes_nothing(attn: str, block: str) -> None:
    model, source, target = build(attn=attn, block=block, heads=2), ids(2, 5), ids(2, 7)
    changed = torch.cat([target[:, :3], ids(2, 4)], dim=1)
    out = model(source, target)[:, :3]
    torch.testing.assert_close(model(source, changed)[:, :3], out, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(ids(2, 5), target)[:, :3], out)


def test_decode_continues_encode() -> None:
    model, source, target = build(), ids(2, 5), ids(2, 4)
    memory = model.encode(source)
    torch.testing.assert_close(model.decode(target, memory), model(source, target))


def test_decoder_has_its_own_depth_heads_and_layers() -> None:
    model = build(
        decoder_depth=3,
        decoder_heads=4,
        layers={"0": {"attn": "flow"}},
        decoder_layers={"-1": {"cross": "linear", "ffn": "swiglu"}},
    )
    encoder, decoder = model.encoder.blocks, model.decoder.blocks
    assert (len(encoder), len(decoder)) == (2, 3)
    assert (encoder[0].attn.part.heads, decoder[0].attn.part.heads) == (3, 4)
    cores = [b.cross.part.config.core.to_dict()["name"] for b in decoder]
    assert cores == ["softmax", "softmax", "linear"]
    assert decoder[2].order == ("ffn1", "attn", "cross", "ffn2")
    assert decoder[2].attn.part.core.config.causal
    assert not decoder[2].cross.part.core.config.causal


@pytest.mark.parametrize("share", ["all", "target", "none"])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize("block", ["macaron", "prenorm"])
def test_fairseq_layout_round_trip(share: str, block: str, positions: str, tmp_path: Path) -> None:
    options = {"share": share, "block": block, "positions": positions, "context": 9}
    model, source, target = build(**options), ids(2, 5), ids(2, 4)
    file = effformer.save_weights(model, tmp_path / "wmt.safetensors", layout="fairseq")
    other = build(**options)
    assert effformer.load_weights(other, file).layout == "fairseq"
    torch.testing.assert_close(other(source, target), model(source, target), rtol=0, atol=0)


def test_fairseq_layout_with_separate_tables_is_refused() -> None:
    model = build(share="none")
    state = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    with pytest.raises(FormatError, match="this model shares one table"):
        effformer.load_weights(build(), state)


OPTIONS: dict[str, Any] = {
    "positions": "learned",
    "context": 9,
    "decoder_positions": "none",
    "final_norm": True,
    "decoder_final_norm": False,
    "decoder_layers": {":": {"block": {"post_norm": True, "first_hidden": 7, "factor": 0.25}}},
}


def test_saves_and_loads_every_option(tmp_path: Path) -> None:
    model, source, target = build(**OPTIONS), ids(2, 5), ids(2, 4)
    loaded = effformer.load_model(effformer.save_pretrained(model, tmp_path / "macaron"))
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(source, target), model(source, target), rtol=0, atol=0)
    assert isinstance(model.decoder.norm, torch.nn.Identity)
    assert model.decoder.blocks[1].ffn1.part.hidden == 7


def test_learned_positions_end() -> None:
    model = build(positions="learned", context=9, decoder_context=4)
    assert model(ids(2, 9), ids(2, 4)).shape == (2, 4, 31)
    for source, target, most in ((10, 4, 9), (9, 5, 4)):
        with pytest.raises(ValueError, match=f"{most + 1} tokens, but positions for {most} only"):
            model(ids(2, source), ids(2, target))
    assert set(model.example_inputs()) == {"source", "target"}
    model(**model.example_inputs())
    assert not model.positions.weight[PAD].any()


def test_saves_and_loads(tmp_path: Path) -> None:
    model, source, target = build(decoder_depth=1), ids(2, 5), ids(2, 4)
    loaded = effformer.load_model(effformer.save_pretrained(model, tmp_path / "macaron"))
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(source, target), model(source, target), rtol=0, atol=0)


def test_every_parameter_learns() -> None:
    model = build(share="none")
    model(ids(2, 5), ids(2, 4)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_impossible_combinations() -> None:
    with pytest.raises(CapabilityError, match=r"no attention to a memory.*macaron.*prenorm"):
        build(block="parallel")
    with pytest.raises(CapabilityError, match=r"decoder blocks\[0:2\]\.cross: 'relative'"):
        build(cross="relative")
    with pytest.raises(ValueError, match="share='all' needs one vocabulary, got 31 and 40"):
        build(target_vocab=40)
    with pytest.raises(ValueError, match="pad must be a token id, got 31"):
        build(pad=31)
    with pytest.raises(ValueError, match=r"decoder_depth must lie in \[1, 4096\], got 0"):
        build(decoder_depth=0)
    for name in ("decoder_heads", "context", "decoder_context"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            build(**{name: 0})
    with pytest.raises(ValueError, match=r"positions.*sinusoidal.*learned.*none"):
        build(positions="rotary")
    assert build(target_vocab=40, share="target")(ids(1, 3), ids(1, 2)).shape == (1, 2, 40)


def test_bad_input() -> None:
    model = build()
    with pytest.raises(TypeError, match=r"source: tokens must be int64 ids, got torch\.float32"):
        model(torch.zeros(1, 3), ids(1, 2))
    with pytest.raises(ValueError, match=r"target: tokens: expected shape \(B, N\), got \(2,\)"):
        model(ids(1, 3), ids(1, 2)[0])
    with pytest.raises(TypeError, match="mask: expected bool, True = may attend"):
        model(ids(1, 3), ids(1, 2), torch.ones(1, 3))


@pytest.mark.slow
def test_exports_with_any_batch_and_lengths() -> None:
    model = build(depth=1)
    batch, n, m = (torch.export.Dim(name) for name in ("batch", "target", "source"))
    dims = {"source": {0: batch, 1: m}, "target": {0: batch, 1: n}}
    program = torch.export.export(model, (), model.example_inputs(2), dynamic_shapes=dims)
    source, target = ids(3, 9), ids(3, 6)
    out = program.module()(source=source, target=target)
    torch.testing.assert_close(out, model(source, target), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [(1,) * 6, (2, 3, 1)])
@pytest.mark.parametrize("cross", ["softmax", "linear", "topk"])
@torch.no_grad()
def test_decoder_step_by_step_is_the_whole(cross: str, pieces: tuple[int, ...]) -> None:
    """States of all branches, the memory's among them: its keys are projected once."""
    model = build(cross=cross).double()
    source, target = ids(2, 5), ids(2, 6)
    source[0, :2] = PAD
    real = source != PAD
    memory, tower = model.encode(source), model.decoder
    h = scaled_tokens(model.embed, target, target != PAD, model.target_positions)
    whole = tower(h, Context(memory=memory, memory_mask=real))
    calls: list[int] = []
    for block in tower.blocks:
        block.cross.part.kv.register_forward_hook(lambda *_: calls.append(1))
    states, outputs = init_states(tower, 2, like=h), []
    for piece in h.split(pieces, dim=1):
        stream = Stream(states)
        outputs.append(tower(piece, Context(memory=memory, memory_mask=real, stream=stream)))
        states = stream.after
    assert len(calls) == len(tower.blocks)
    found = torch.cat(outputs, dim=1)
    scale = float(whole.abs().max())
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9 * scale)
    logits = torch.nn.functional.linear(found, model.embed.weight)
    expected = model(source, target)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_queries_that_compete_cannot_stand_in_a_decoder() -> None:
    with pytest.raises(
        CapabilityError, match=r"'flow' lets queries compete .*; choices: .*softmax"
    ):
        build(cross="flow")
