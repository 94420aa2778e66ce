"""Macaron Net: single layers of encoder and decoder, pre- and post-norm, both sub-projects."""

from __future__ import annotations

from typing import Any

import torch
from effformer.models.layouts.macaron import (
    DECODER_LAYER,
    ENCODER_LAYER,
    PLAIN_DECODER_LAYER,
    PLAIN_ENCODER_LAYER,
)
from harness import Golden

import effformer
from effformer.attention import Attention, Softmax
from effformer.blocks import Block, Macaron, PostNorm, PreNorm
from effformer.context import Context
from effformer.ffn import MLP
from effformer.layout import Layout
from effformer.site import NormRule, Site

LAYOUTS = {
    (False, False): ENCODER_LAYER,
    (False, True): PLAIN_ENCODER_LAYER,
    (True, False): DECODER_LAYER,
    (True, True): PLAIN_DECODER_LAYER,
}
"""(decoder, plain) -> layout."""


def check(golden: Golden) -> None:
    cases = [key.removeprefix("in.").removesuffix(".x") for key in golden.keys("in.")]
    cases = [case for case in cases if f"out.{case}" in golden.tensors]
    assert cases
    for case in cases:
        _check_case(golden, case)


def _check_case(golden: Golden, case: str) -> None:
    block, layout = _load(golden, case)
    inputs = {
        name: golden.tensor(f"in.{case}.{name}").clone().requires_grad_()
        for name in ("x", "encoder_out")
        if f"in.{case}.{name}" in golden.tensors
    }
    padding = golden.tensors.get("in.enc.padding_mask")
    mask = None if padding is None else padding == 0
    ctx = Context(mask=mask)
    if "encoder_out" in inputs:
        ctx = Context(memory=inputs["encoder_out"].transpose(0, 1), memory_mask=mask)
    y = block(inputs["x"].transpose(0, 1), ctx).transpose(0, 1)
    golden.assert_close(y, f"out.{case}")
    if f"in.{case}.cotangent" in golden.tensors:
        y.backward(golden.tensor(f"in.{case}.cotangent"))
        _check_gradients(golden, case, block, layout, inputs)


def _check_gradients(
    golden: Golden, case: str, block: Block, layout: Layout, inputs: dict[str, torch.Tensor]
) -> None:
    ours = {k: p.grad for k, p in block.named_parameters() if p.grad is not None}
    grads = layout.from_ours(ours, None)
    grads |= {name: x.grad for name, x in inputs.items() if x.grad is not None}
    keys = golden.keys(f"grad.{case}.")
    assert keys
    for key in keys:
        golden.assert_close(grads[key.removeprefix(f"grad.{case}.")], key)


def _load(golden: Golden, case: str) -> tuple[Block, Layout]:
    decoder, plain = case.startswith("dec"), "plain" in case
    block, layout = _build(golden, case), LAYOUTS[decoder, plain]
    effformer.load_weights(block, golden.weights(f"{case}."), layout)
    return block.eval(), layout


def _build(golden: Golden, case: str) -> Block:
    c = golden.config
    post, plain, decoder = "post" in case, "plain" in case, case.startswith("dec")
    site = Site(
        dim=c["embed_dim"],
        heads=c["heads"],
        memory_dim=c["embed_dim"] if decoder else None,
        norm=NormRule(eps=c["layer_norm_eps"], affine=c["layer_norm_affine"]),
    )
    ffn = {"hidden": c["ffn_dim"], "act": golden.activation(c["second_ffn_activation"])}
    parts: dict[str, Any] = {
        "attn": Attention.Config(core=Softmax.Config(causal=decoder)),
        "ffn": MLP.Config.from_dict(ffn),
    }
    if decoder:
        parts["cross"] = Attention.Config()
    if plain:
        kind = PostNorm if post else PreNorm
        return kind(kind.Config(), site, **parts)
    config = {
        "share": 1.0,
        "factor": c["fc_factor"],
        "first_act": golden.activation(c["first_ffn_activation"]),
        "post_norm": post,
    }
    return Macaron(Macaron.Config.from_dict(config), site, **parts)
