"""Macaron Net in the style of BERT: sizes, heads, padding, layout, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.models.macaron_bert import PRESETS, MacaronBert

import effformer

TINY: dict[str, Any] = {"vocab": 31, "dim": 24, "depth": 2, "heads": 3}
PAD = 1


def build(**overrides: Any) -> MacaronBert:
    model = effformer.build_model("macaron-bert-tiny", **{**TINY, **overrides})
    assert isinstance(model, MacaronBert)
    return model.eval()


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, TINY["vocab"], (batch, tokens))


def test_parameters_of_the_published_sizes() -> None:
    def count(model: torch.nn.Module) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if name != "embed.weight")

    with torch.device("meta"):
        base = effformer.build_model("macaron-bert-base")
        plain = effformer.build_model("macaron-bert-base", block="prenorm")
        small = effformer.build_model("transformer_bert_L6_A12_macaron")
    assert (count(base), count(plain)) == (85_621_249, 85_612_033)
    assert count(base) - count(plain) == 12 * 768
    assert count(small) == PRESETS["macaron-bert-l6"].params
    activations = [base.blocks[0].ffn1.part.config.act, base.blocks[0].ffn2.part.config.act]
    assert activations == ["relu", "gelu"]


@pytest.mark.parametrize("attn", ["softmax", "flow", "linear"])
def test_padding_changes_nothing(attn: str) -> None:
    model, tokens = build(attn=attn), ids(2, 5)
    padded = torch.cat([tokens, torch.full((2, 3), PAD)], dim=1)
    out, short = model(padded), model(tokens)
    torch.testing.assert_close(out.mlm[:, :5], short.mlm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.nsp, short.nsp, rtol=1e-4, atol=1e-5)


def test_rows_are_rows_of_the_whole() -> None:
    model, tokens = build(), ids(2, 5)
    rows = torch.tensor([1, 4, 7])
    some = model(tokens, rows=rows).mlm
    assert_close(some, model(tokens).mlm.flatten(0, 1)[rows], rtol=1e-4, atol=1e-5)


def test_the_first_sentence_is_not_marked() -> None:
    model, tokens = build(), ids(2, 5)
    first = torch.ones_like(tokens)
    torch.testing.assert_close(model(tokens, first).mlm, model(tokens).mlm, rtol=0, atol=0)
    second = torch.zeros_like(tokens)
    assert not torch.allclose(model(tokens, second).mlm, model(tokens).mlm)


@pytest.mark.parametrize("block", ["macaron", "prenorm"])
@pytest.mark.parametrize("options", [{}, {"positions": "learned", "context": 9, "tied": False}])
def test_fairseq_layout_round_trip(block: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = {"block": block, "norm_affine": True, **options}
    model, tokens = build(**options), ids(2, 5)
    file = effformer.save_weights(model, tmp_path / "bert.safetensors", layout="fairseq")
    other = build(**options)
    assert effformer.load_weights(other, file).layout == "fairseq"
    loaded = effformer.load_model(effformer.save_pretrained(model, tmp_path / "bert"))
    assert loaded.config == model.config
    torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=0)


def test_bad_input_and_configs() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"segments: expected shape \(B, N\), got \(1, 2\)"):
        model(ids(1, 3), ids(1, 2))
    with pytest.raises(ValueError, match=r"rows: expected shape \(R,\), got \(1, 1\)"):
        model(ids(1, 3), rows=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="pad must be a token id below 31, got 31"):
        build(pad=31)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        build(context=0)
    with pytest.raises(ValueError, match="6 tokens, but positions for 5 only"):
        build(positions="learned", context=5)(ids(1, 6))


def test_exports_with_any_batch_and_length() -> None:
    model = build(depth=1)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    inputs = model.example_inputs(2)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, axes))
    tokens, segments = ids(3, 7), torch.ones(3, 7, dtype=torch.int64)
    out = program.module()(tokens=tokens, segments=segments)
    torch.testing.assert_close(out, model(tokens, segments), rtol=1e-4, atol=1e-5)
