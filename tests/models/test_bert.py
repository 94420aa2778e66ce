"""BERT: packed equals padded, any mask, sizes, layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close, largest
from effformer.models.bert import PRESETS, Bert
from safetensors.torch import load_file

import effformer
from effformer import CapabilityError, Packing
from effformer.checks import FormatError
from effformer.files import read_json

TINY: dict[str, Any] = {"vocab": 31, "context": 20, "dim": 24, "depth": 2, "heads": 3}
LENGTHS = torch.tensor([[9], [1], [0], [12], [4]])
RIGHT = torch.arange(12) < LENGTHS
LEFT = RIGHT.flip(1)


def holes() -> torch.Tensor:
    mask = torch.rand(5, 12) < 0.6
    mask[2] = False
    return mask


def build(**overrides: Any) -> Bert:
    model = effformer.build_model("bert-tiny", **{**TINY, **overrides})
    assert isinstance(model, Bert)
    return model.eval()


def ids(batch: int = 5, tokens: int = 12) -> torch.Tensor:
    return torch.randint(0, TINY["vocab"], (batch, tokens))


@pytest.mark.parametrize("name", ["bert-base", "bert-large"])
def test_parameters_of_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].params


@pytest.mark.parametrize("block", ["postnorm", "prenorm", "macaron", "parallel", "respost"])
@pytest.mark.parametrize("attn", ["softmax", "flow", "linear"])
def test_packed_equals_padded(attn: str, block: str) -> None:
    model, tokens, segments = build(attn=attn, block=block), ids(), torch.randint(0, 2, (5, 12))
    for mask in (RIGHT, LEFT, holes()):
        padded = model(tokens, segments, mask)
        packed = model(tokens, segments, mask, packed=True)
        assert_close(packed, padded, rtol=1e-4, atol=1e-5)
        assert not packed.hidden[~mask].any()
        assert packed.hidden.isfinite().all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attn", ["softmax", "flow"])
def test_ids_on_padding_change_nothing(attn: str, packed: bool) -> None:
    model, tokens, mask = build(attn=attn), ids(), holes()
    junk = torch.where(mask, tokens, ids())
    out = model(tokens, mask=mask, packed=packed).hidden
    torch.testing.assert_close(
        model(junk, mask=mask, packed=packed).hidden, out, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("packed", [False, True])
def test_permuting_samples_permutes_outputs(packed: bool) -> None:
    model, tokens, mask, order = build(), ids(), holes(), torch.tensor([3, 0, 4, 2, 1])
    out = model(tokens, mask=mask, packed=packed).hidden
    turned = model(tokens[order], mask=mask[order], packed=packed).hidden
    torch.testing.assert_close(turned, out[order], rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_the_padded_run() -> None:
    model, tokens, mask = build(), ids(), holes()
    grads = []
    for packed in (False, True):
        model.zero_grad()
        (model(tokens, mask=mask, packed=packed).hidden ** 2).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    # the gradient of the keys' bias is zero but for rounding
    size = max(largest(g) for g in grads[0].values())
    assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6, scale=size)


def test_packing_round_trip() -> None:
    mask, x = holes(), torch.randn(5, 12, 3)
    packing = Packing.from_mask(mask)
    packed = packing.pack(x)
    assert packed.shape == (1, mask.sum(), 3)
    torch.testing.assert_close(packing.unpack(packed), x * mask.unsqueeze(-1), rtol=0, atol=0)
    torch.testing.assert_close(packing.pack(packing.unpack(packed)), packed, rtol=0, atol=0)
    columns = torch.arange(12).expand(5, 12)[mask]
    torch.testing.assert_close(packing.positions, columns)


def test_packed_touches_real_tokens_only() -> None:
    model, tokens = build(), ids()
    seen = []
    linear = model.blocks[0].ffn.part.fc1
    linear.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    model(tokens, mask=RIGHT, packed=True)
    assert seen == [(1, int(LENGTHS.sum()), 24)]


def test_huggingface_layout_round_trip(tmp_path: Path) -> None:
    model, tokens = build(), ids()
    file = effformer.save_weights(model, tmp_path / "bert.safetensors", layout="huggingface")
    state = {f"bert.{k}": v for k, v in effformer.io.read_weights(file).items()}
    state["bert.embeddings.position_ids"] = torch.arange(20)[None]
    old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    for new, name in old.items():
        state = {k.replace(new, name): v for k, v in state.items()}
    other = build()
    assert effformer.load_weights(other, state).layout == "huggingface"
    torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=0)


def test_without_pooler() -> None:
    out = build(pooler=False)(ids())
    assert out.pooled.shape == (5, 0)


def test_bad_input_and_configs() -> None:
    model = build()
    with pytest.raises(ValueError, match="21 tokens, but positions for 20 only"):
        model(ids(1, 21))
    with pytest.raises(ValueError, match=r"segments: expected shape \(B, N\), got \(1, 2\)"):
        model(ids(1, 3), ids(1, 2))
    with pytest.raises(ValueError, match="segments must be at least 1, got 0"):
        build(segments=0)
    with pytest.raises(CapabilityError, match="cannot honour a key mask"):
        build(attn="relative")


def test_exports_padded_with_any_batch_and_length() -> None:
    model = build(depth=1)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=20)}
    inputs = model.example_inputs(2)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, axes))
    tokens, segments = ids(), torch.zeros(5, 12, dtype=torch.int64)
    out = program.module()(tokens=tokens, segments=segments, mask=RIGHT)
    torch.testing.assert_close(out, model(tokens, segments, RIGHT), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "attn", ["delta", "ssd", "gla", "nystrom", {"name": "softmax", "short_conv": 3}], ids=str
)
@torch.no_grad()
def test_what_looks_at_neighbours_sees_the_holes_of_a_packed_row(attn: Any) -> None:
    """Tokens on either side of a hole are no neighbours, packed or padded."""
    torch.manual_seed(0)
    model = effformer.build_model("bert-tiny", attn=attn).eval().double()
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.05)
    tokens = torch.randint(0, 256, (2, 8))
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 0, 0]]).bool()
    padded, packed = (model(tokens, mask=mask, packed=p).hidden[mask] for p in (False, True))
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)


PRETRAINED = Path(__file__).parent / "pretrained"
"""Small random models as transformers 5.24 saved them, and what it computed with them."""


def of_transformers(config: Any) -> Any:
    """A model for the weights of a BERT or RoBERTa config of transformers."""
    kind = {"gelu": "gelu", "gelu_new": "gelu-tanh"}[config["hidden_act"]]
    shift = 2 if config["model_type"] == "roberta" else 0
    return effformer.build_model(
        "bert-tiny", dim=config["hidden_size"], depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"], vocab=config["vocab_size"],
        context=config["max_position_embeddings"] - shift, segments=config["type_vocab_size"],
        norm_eps=config["layer_norm_eps"], ffn={"act": kind, "hidden": config["intermediate_size"]},
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("name", "layout"), [("bert", "huggingface"), ("roberta", "roberta")])
@torch.no_grad()
def test_what_transformers_saved(name: str, layout: str, tmp_path: Path) -> None:
    folder = PRETRAINED / name
    config, right = read_json(folder / "config.json"), load_file(folder / "outputs.safetensors")
    model, mask = of_transformers(config), right["mask"]
    report = effformer.load_weights(model, folder)
    assert report.layout == layout
    assert set(report.confirmed) >= {"num_attention_heads", "hidden_act", "layer_norm_eps"}
    assert all(key.startswith("cls.") for key in report.ignored)
    for packed in (False, True):
        out = model(right["tokens"], right["segments"], mask, packed=packed)
        assert_close(out.hidden[mask], right["hidden"][mask], rtol=1e-5, atol=1e-6)
        assert_close(out.pooled, right["pooled"], rtol=1e-5, atol=1e-6)
    for change in ({"num_attention_heads": 4}, {"layer_norm_eps": 1e-3}, {"hidden_act": "gelu"}):
        if change.items() <= config.items():
            continue
        with pytest.raises(FormatError, match=f"its network differs: {next(iter(change))} is"):
            effformer.load_weights(of_transformers(config | change), folder)
    theirs = load_file(folder / "model.safetensors")
    ours = load_file(effformer.save_weights(model, tmp_path / "w.safetensors", layout))
    prefix = "bert." if name == "bert" else ""
    assert {prefix + key for key in ours} == theirs.keys() - set(report.ignored)
    for key, value in ours.items():
        unused = 2 if name == "roberta" and "position_embeddings" in key else 0
        assert torch.equal(value[unused:], theirs[prefix + key][unused:])


@pytest.mark.parametrize("name", ["bert", "roberta"])
@torch.no_grad()
def test_transformers_computes_what_was_written(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference itself")
    config = read_json(PRETRAINED / name / "config.json") | {"hidden_size": 24, "vocab_size": 31}
    model = of_transformers(config)
    layout = {"bert": "huggingface", "roberta": "roberta"}[name]
    effformer.save_weights(model, tmp_path / "model.safetensors", layout)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, told = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, mask = torch.randint(2, 31, (3, 9)), torch.arange(9) < torch.tensor([[9], [5], [1]])
    tokens = tokens.masked_fill(~mask, config["pad_token_id"])
    right = theirs.eval()(input_ids=tokens, attention_mask=mask.long())
    out = model(tokens, mask=mask)
    assert_close(out.hidden[mask], right.last_hidden_state[mask], rtol=1e-5, atol=1e-6)
    assert_close(out.pooled, right.pooler_output, rtol=1e-5, atol=1e-6)
