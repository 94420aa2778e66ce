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
    config = ViT.Config(
        dim=c["hidden"], depth=c["layers"], heads=c["heads"], image_size=c["image"],
        patch=c["patch"], num_classes=c["classes"], channels=golden.tensor("in.x").shape[1],
        layers={str(i): _layer(golden, i, fixed) for i in range(c["layers"])},
    )  # fmt: skip
    model = ViT(config.replace(norm={"eps": c["layernorm_eps"]})).eval()
    effformer.load_weights(model, golden.weights())
    return model


def _layer(golden: Golden, i: int, fixed: int | None) -> dict[str, Any]:
    """FFN and attention of one block, either of which may have been left as it was."""
    c, act = golden.config, golden.activation(golden.config["ffn_activation"])
    common: dict[str, Any] = {
        "learners": c["num_blocks"],
        "bias": c["bias"] in (True, "hidden_only"),
        "out_bias": c["bias"] in (True, "out_only"),
        "fixed": fixed,
        "gate": {name: c["gate"][name] for name in ("depth", "hidden", "tau")},
    }
    made: dict[str, Any] = {"ffn": {"name": "mlp", "hidden": c["mlp"], "act": act}}
    place = f"encoder.layers.encoder_layer_{i}"
    if (width := c["block_dims"].get(f"{place}.mlp")) is not None:
        made["ffn"] = {"name": "acm", "hidden": width * c["num_blocks"], "act": act, **common}
        made["ffn"]["least"] = c["gate"]["min_choice_ffn"]
    widths = {name: c["block_dims"].get(f"{place}.self_attention.{name}") for name in PROJECTIONS}
    width = widths["q_proj"]
    for name in PROJECTIONS:
        golden.only(name, width, why="one attention has one width of learners", among=widths)
    if width is not None:
        act = golden.activation(c["attention_activation"])
        least = c["gate"]["min_choice_attention_projections"]
        projections = {"width": width, "act": act, **common, "least": least}
        made["attn"] = {"projections": projections}
    return made
