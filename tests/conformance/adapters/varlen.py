"""Packed BERT: indices, every layer's packed tokens, the scatter back and the pooler."""

from __future__ import annotations

import torch
from effformer.models.bert import Bert
from harness import Golden

import effformer
from effformer.context import Context, Packing


def check(golden: Golden) -> None:
    c = golden.config
    model = effformer.build_model(
        "bert-tiny",
        dim=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        ffn={"hidden": c["intermediate_size"], "act": golden.activation(c["hidden_act"])},
        vocab=c["vocab_size"],
        context=c["max_position_embeddings"],
        segments=golden.weights("embeddings.token_type_embeddings.")["weight"].shape[0],
        norm_eps=c["layer_norm_eps"],
    ).eval()
    assert isinstance(model, Bert)
    report = effformer.load_weights(model, golden.weights())
    assert report.layout == "huggingface"
    cases = [k.split(".")[1] for k in golden.keys("in.") if k.endswith(".attention_mask")]
    assert cases
    with torch.no_grad():
        for case in cases:
            _check_case(golden, model, case)


def _check_case(golden: Golden, model: Bert, case: str) -> None:
    mask = golden.tensor(f"in.{case}.attention_mask").bool()
    tokens, segments = golden.tensor("in.input_ids"), golden.tensor("in.token_type_ids")
    packing = Packing.from_mask(mask)
    golden.assert_close(packing.indices, f"out.{case}.indices")
    golden.assert_close(packing.offsets, f"out.{case}.cu_seqlens")
    golden.assert_close(packing.positions, f"out.{case}.position_ids")
    h = model.embedding(tokens, segments, packing)
    golden.assert_close(h[0], f"out.{case}.packed_hidden.0")
    for i, block in enumerate(model.blocks):
        h = block(h, Context(packing=packing))
        golden.assert_close(h[0], f"out.{case}.packed_hidden.{i + 1}")
    golden.assert_close(h[0], f"out.{case}.packed_last_hidden")
    for packed in (True, False):
        out = model(tokens, segments, mask, packed=packed)
        golden.assert_close(out.hidden, f"out.{case}.restored")
        golden.assert_close(out.pooled, f"out.{case}.pooler")
