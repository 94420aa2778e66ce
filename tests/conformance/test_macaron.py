"""Macaron Net with options that the golden sets do not have, against fairseq written down slowly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq_reference import BERT, TRANSLATION, Options, State, bert, translate
from fairseq_reference import layer as reference_layer
from fairseq_state import bert_state, translation_state
from fairseq_state import layer as layer_state
from harness import Golden, load_adapter
from torch import Tensor

POST = {"encoder_normalize_before": False, "decoder_normalize_before": False}
LEARNED = {"encoder_learned_pos": True, "decoder_learned_pos": True}
APART = {"share_all_embeddings": False, "share_decoder_input_output_embed": False}
WIDE = {f"{name}_dim": 15 for name in ("encoder_embed", "decoder_embed")}
WIDE |= {"decoder_input_dim": 15, "decoder_output_dim": 15}
TRANSLATIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "post-norm": POST,
    "post-norm encoder": {"encoder_normalize_before": False},
    "post-norm decoder": {"decoder_normalize_before": False},
    "plain, post-norm encoder": {"macaron": False, "encoder_normalize_before": False},
    "learned": LEARNED,
    "learned encoder, short": {"encoder_learned_pos": True, "max_source_positions": 6},
    "learned decoder, left": {"decoder_learned_pos": True, "left_pad_target": True},
    "no positions": {**LEARNED, "no_token_positional_embeddings": True},
    "own decoder": {
        "decoder_ffn_embed_dim": 14, "decoder_attention_heads": 2, "decoder_layers": 2,
    },
    "own tables": {**APART, **LEARNED},
    "target's table": {**APART, "share_decoder_input_output_embed": True},
    "right padded source": {"left_pad_source": False},
    "padding is 0": {"pad_index": 0, **LEARNED},
    "padding is 5": {"pad_index": 5},
    "odd width": {**WIDE, "encoder_attention_heads": 5, "decoder_attention_heads": 1},
    "new": {"macaron": "new"},
}  # fmt: skip
BERTS: dict[str, dict[str, Any]] = {
    "published": {},
    "post-norm": {"encoder_normalize_before": False},
    "plain": {"macaron": False, "no_normalize_affine": False},
    "learned": {"encoder_learned_pos": True, "max_source_positions": 7},
    "no positions": {"no_token_positional_embeddings": True},
    "relu": {"act_fn": "relu", "encoder_ffn_embed_dim": 9},
    "own output": {"share_all_embeddings": False},
    "affine": {"no_normalize_affine": False, "encoder_layers": 3, "encoder_attention_heads": 2},
    "padding is 0": {"pad_index": 0, "encoder_learned_pos": True},
}


LAYERS: dict[str, dict[str, Any]] = {
    "published": {},
    "factor": {"fc_factor": 0.3},
    "activations": {"first_ffn_activation": "gelu (erf)", "second_ffn_activation": "relu"},
    "bert": {"layer_norm_affine": False, "second_ffn_activation": "gelu (erf)"},
    "odd": {"embed_dim": 15, "heads": 5, "ffn_dim": 7},
}


def ids(vocab: int, pad: int, *, left: bool, tokens: int) -> Tensor:
    """Three samples (3, N), two of them padded on a side."""
    drawn = torch.randint(0, vocab - 1, (3, tokens))
    drawn += drawn >= pad
    for row, count in enumerate((0, 1, 3)):
        drawn[row, slice(0, count) if left else slice(tokens - count, tokens)] = pad
    return drawn


def leaves(state: State) -> State:
    """The state dict ready for gradients; shared tensors stay shared."""
    kept = {id(x): x.clone().requires_grad_() for x in state.values()}
    return {name: kept[id(x)] for name, x in state.items()}


def made(config: dict[str, Any], state: State, **tensors: Tensor) -> Golden:
    weights = {f"w.{name}": x.detach() for name, x in state.items()}
    named = {name.replace("_", ".", 1): x.detach() for name, x in tensors.items()}
    meta = {"config": config, "tolerance": "rtol 1e-6, atol 1e-6"}
    return Golden("made", meta, weights | named)


def check_gradients(model: Any, loss: Tensor, expected: State) -> None:
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    official = model.LAYOUTS[0].from_ours(grads, model.config)
    compared = 0
    for name, leaf in expected.items():
        if leaf.grad is not None:
            torch.testing.assert_close(official[name], leaf.grad, rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared == len(official)


def layer_case(c: Options, case: str, padding: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Weights, inputs and result of one block, in fairseq's order of axes."""
    decoder, plain, w = case.startswith("dec"), "plain" in case, State()
    widths = {f"{name}_ffn_embed_dim": c["ffn_dim"] for name in ("encoder", "decoder")}
    options = {"encoder_embed_dim": c["embed_dim"], "macaron": not plain, **widths}
    options["no_normalize_affine"] = not c["layer_norm_affine"]
    layer_state(w, options, "at.", "decoder" if decoder else "encoder")
    x, far = (torch.randn(3, n, c["embed_dim"], dtype=torch.float64) for n in (4, 6))
    x = x if decoder else far.clone()
    first, second = (c[f"{n}_ffn_activation"].split()[0] for n in ("first", "second"))
    o = {"pre": "post" not in case, "heads": c["heads"], "macaron": not plain, "act": second}
    o |= {"factor": c["fc_factor"], "first_act": first}
    out = [
        reference_layer(x[b], far[b] if decoder else None, w, "at", {**o, "real": padding[b] == 0})
        for b in range(3)
    ]
    tensors = {f"w.{case}.{name.removeprefix('at.')}": v for name, v in w.items()}
    tensors |= {f"in.{case}.x": x.transpose(0, 1)}
    tensors |= {f"in.{case}.encoder_out": far.transpose(0, 1)} if decoder else {}
    return tensors, torch.stack(out).transpose(0, 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS)
def test_layers(changes: dict[str, Any], masked: bool) -> None:
    c = {
        "embed_dim": 12, "heads": 3, "ffn_dim": 10, "fc_factor": 0.5, "layer_norm_eps": 1e-5,
        "first_ffn_activation": "relu", "second_ffn_activation": "relu", "layer_norm_affine": True,
    } | changes  # fmt: skip
    padding = torch.zeros(3, 6, dtype=torch.uint8)
    padding[1:, 4:] = int(masked)
    tensors = {"in.enc.padding_mask": padding} if masked else {}
    for tower in ("enc", "dec"):
        for form in ("prenorm", "postnorm", "prenorm_plain", "postnorm_plain"):
            made_here, out = layer_case(c, f"{tower}_{form}", padding)
            tensors |= {**made_here, f"out.{tower}_{form}": out}
    golden = Golden("made", {"config": c, "tolerance": "rtol 1e-9, atol 1e-9"}, tensors)
    with golden.precision():
        load_adapter("macaron").check(golden)


@pytest.mark.parametrize("changes", TRANSLATIONS.values(), ids=TRANSLATIONS)
def test_translation(changes: dict[str, Any]) -> None:
    c = {**TRANSLATION, **changes}
    w, adapter = leaves(translation_state(c)), load_adapter("macaron_model")
    source = ids(c["vocab"], c["pad_index"], left=c["left_pad_source"], tokens=6)
    target = ids(c["vocab"], c["pad_index"], left=c["left_pad_target"], tokens=5)
    memory, logits = translate(c, w, source, target)
    golden = made(
        c, w, in_src_tokens=source, in_prev_output_tokens=target,
        out_encoder_out=memory.transpose(0, 1), out_logits=logits,
    )  # fmt: skip
    with golden.precision():
        adapter.check(golden)
        model = adapter.build(golden)
        weight = torch.randn_like(logits)
        (logits * weight).sum().backward()
        check_gradients(model, (model(source, target) * weight).sum(), w)


@pytest.mark.parametrize("changes", BERTS.values(), ids=BERTS)
def test_bert(changes: dict[str, Any]) -> None:
    c = {**BERT, **changes}
    w, adapter = leaves(bert_state(c)), load_adapter("macaron_bert_model")
    tokens = ids(c["vocab"], c["pad_index"], left=False, tokens=7)
    segments, chosen = torch.randint(0, 2, tokens.shape), torch.rand(tokens.shape) < 0.4
    features, logits, following = bert(c, w, tokens, segments)
    golden = made(
        c, w, in_src_tokens=tokens, in_segment=segments, in_output_mask=chosen.to(torch.uint8),
        out_encoder_out=features.transpose(0, 1), out_mlm_logits=logits[chosen],
        out_nsp_logit=following,
    )  # fmt: skip
    with golden.precision():
        adapter.check(golden)
        model = adapter.build(golden)
        weight = torch.randn_like(logits)
        ((logits * weight).sum() + following.sum()).backward()
        out = model(tokens, segments)
        check_gradients(model, (out.mlm * weight).sum() + out.nsp.sum(), w)


def test_what_cannot_be_known_is_refused() -> None:
    adapter = load_adapter("macaron_model")
    for option, value in (("adaptive_softmax_cutoff", "4,8"), ("decoder_embed_dim", 24)):
        golden = Golden("made", {"config": {**TRANSLATION, option: value}}, {})
        with pytest.raises(NotImplementedError, match=f"made: {option}={value!r} is not supported"):
            adapter.check(golden)
