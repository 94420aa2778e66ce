"""Macaron Net: single layers of encoder and decoder, pre- and post-norm, both sub-projects."""

from __future__ import annotations

from typing import Any

import torch
from effformer.models.layouts.macaron import DECODER_LAYER, ENCODER_LAYER, PLAIN_ENCODER_LAYER
from harness import Golden

import effformer
from effformer.attention import Attention, Softmax
from effformer.blocks import Block, Macaron, PostNorm, PreNorm
from effformer.context import Context, Site
from effformer.ffn import MLP
from effformer.layout import Layout


def check(golden: Golden) -> None:
    cases = [key.removeprefix("in.").removesuffix(".x") for key in golden.keys("in.")]
    cases = [case for case in cases if f"out.{case}" in golden.tensors]
    assert cases
    for case in cases:
        if case.startswith("enc"):
            _check_encoder(golden, case)
        else:
            _check_decoder(golden, case)


def _build(golden: Golden, case: str) -> Block:
    c = golden.config
    post, plain, decoder = "post" in case, "plain" in case, case.startswith("dec")
    second, first = (c[f"{which}_ffn_activation"].split()[0] for which in ("second", "first"))
    site = Site(
        dim=c["embed_dim"],
        heads=c["heads"],
        memory_dim=c["embed_dim"] if decoder else None,
        norm_eps=c["layer_norm_eps"],
        norm_affine=c["layer_norm_affine"],
    )
    attn = Attention.Config(core=Softmax.Config(causal=decoder))
    # a Macaron block takes the width of an ordinary one and gives each half its share
    ffn: dict[str, Any] = {"hidden": c["ffn_dim"] if plain else 2 * c["ffn_dim"], "act": second}
    parts: dict[str, Any] = {"attn": attn, "ffn": MLP.Config.from_dict(ffn)}
    if decoder:
        parts["cross"] = Attention.Config()
    if plain:
        return (
            PostNorm(PostNorm.Config(), site, **parts)
            if post
            else PreNorm(PreNorm.Config(), site, **parts)
        )
    config = Macaron.Config.from_dict({"first_act": first, "post_norm": post})
    assert c["fc_factor"] == 0.5
    return Macaron(config, site, **parts)


def _load(golden: Golden, case: str) -> tuple[Block, Layout]:
    block = _build(golden, case)
    plain, decoder = "plain" in case, case.startswith("dec")
    layout = DECODER_LAYER if decoder else PLAIN_ENCODER_LAYER if plain else ENCODER_LAYER
    effformer.load_weights(block, golden.weights(f"{case}."), layout)
    return block.eval(), layout


def _check_encoder(golden: Golden, case: str) -> None:
    block, layout = _load(golden, case)
    x = golden.tensor(f"in.{case}.x").clone().requires_grad_()
    mask = golden.tensor("in.enc.padding_mask") == 0
    y = block(x.transpose(0, 1), Context(mask=mask)).transpose(0, 1)
    golden.assert_close(y, f"out.{case}")
    (y * golden.tensor(f"in.{case}.cotangent")).sum().backward()
    assert x.grad is not None
    golden.assert_close(x.grad, f"grad.{case}.x")
    grads = {k: p.grad for k, p in block.named_parameters() if p.grad is not None}
    official = layout.from_ours(grads, None)
    for key in golden.keys(f"grad.{case}."):
        if not key.endswith(".x"):
            golden.assert_close(official[key.removeprefix(f"grad.{case}.")], key)


def _check_decoder(golden: Golden, case: str) -> None:
    block, _ = _load(golden, case)
    x, memory = golden.tensor(f"in.{case}.x"), golden.tensor(f"in.{case}.encoder_out")
    mask = golden.tensor("in.enc.padding_mask") == 0
    ctx = Context(memory=memory.transpose(0, 1), memory_mask=mask)
    with torch.no_grad():
        golden.assert_close(block(x.transpose(0, 1), ctx).transpose(0, 1), f"out.{case}")
