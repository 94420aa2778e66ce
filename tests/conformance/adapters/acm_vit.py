"""A vision transformer of adaptive computation modules: fixed numbers of learners, and gated."""

from __future__ import annotations

import re
from typing import Any

import torch
from effformer.models import ViT
from harness import Golden

import effformer
from effformer.context import Ledger

PROJECTIONS = {"q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "o_proj": "attn.proj"}
"""Official names of the modules in a block -> ours in the ledger."""


def check(golden: Golden) -> None:
    model, x = _build(golden), golden.tensor("in.x")
    numbers = sorted(int(k.removeprefix("out.logits_k")) for k in golden.keys("out.logits_k"))
    assert numbers
    for k in numbers:
        with torch.no_grad():
            golden.assert_close(_build(golden, fixed=k)(x), f"out.logits_k{k}")
    ledger = Ledger()
    with torch.no_grad():
        golden.assert_close(model(x, ledger=ledger), "out.logits_gated")
    chosen = golden.keys("out.k.")
    assert len(chosen) == len(ledger.choices)
    for key in chosen:
        golden.assert_close(ledger.choices[_place(key)].gate.argmax(dim=-1), key)


def _place(key: str) -> str:
    found = re.search(r"encoder_layer_(\d+)\.(?:self_attention\.)?(\w+)$", key)
    assert found is not None, key
    return f"blocks.{found[1]}.{PROJECTIONS.get(found[2], 'ffn')}"


def _build(golden: Golden, fixed: int | None = None) -> ViT:
    c = golden.config
    gate = {"depth": c["gate"]["depth"], "hidden": c["gate"]["hidden"], "tau": c["gate"]["tau"]}
    common: dict[str, Any] = {
        "learners": c["num_blocks"],
        "bias": c["bias"] in (True, "hidden_only"),
        "out_bias": c["bias"] in (True, "out_only"),
        "fixed": fixed,
        "gate": gate,
    }
    changes: dict[str, Any] = {}
    ffn = _width(c["block_dims"], r"\.mlp$")
    changes["ffn"] = {"name": "mlp", "hidden": c["mlp"], "act": c["ffn_activation"]}
    if ffn is not None:
        least = c["gate"]["min_choice_ffn"]
        act = c["ffn_activation"]
        changes["ffn"] = {"name": "acm", "hidden": ffn * c["num_blocks"], "act": act, **common}
        changes["ffn"] |= {"least": least}
    width = _width(c["block_dims"], r"_proj$")
    if width is not None:
        assert c["attention_activation"] == "identity", c["attention_activation"]
        least = c["gate"]["min_choice_attention_projections"]
        changes["attn"] = {"projections": {"width": width, **common, "least": least}}
    config = ViT.Config(
        dim=c["hidden"], depth=c["layers"], heads=c["heads"], image_size=c["image"],
        patch=c["patch"], num_classes=c["classes"], channels=golden.tensor("in.x").shape[1],
    )  # fmt: skip
    config = config.replace(norm={"eps": c["layernorm_eps"]}, **changes)
    model = ViT(config).eval()
    effformer.load_weights(model, golden.weights())
    return model


def _width(widths: dict[str, int], pattern: str) -> int | None:
    """The common inner width of the modules that match, None if there are none."""
    found = {width for place, width in widths.items() if re.search(pattern, place)}
    assert len(found) <= 1, found
    return next(iter(found), None)
