"""GenCompositor's fusion block: text, video and foreground in one attention, and gradients."""

from __future__ import annotations

import torch
from effformer.models.layouts.gencompositor import BLOCK
from harness import Golden

import effformer
from effformer.attention import Attention
from effformer.blocks import ExpertAdaLN
from effformer.context import Context, Rope
from effformer.ffn import MLP
from effformer.site import NormRule, Site


def check(golden: Golden) -> None:
    c = golden.config
    golden.only("qk_norm", "layer_norm eps 1e-6", why="CogVideoX has no other")
    site = Site(
        dim=c["dim"], heads=c["num_attention_heads"], cond_dim=c["time_embed_dim"],
        norm=NormRule(eps=c["norm_eps"], modulated_affine=True),
    )  # fmt: skip
    attn = Attention.Config(
        qkv_bias=c["attention_bias"], qk_norm=True, qk_norm_eps=1e-6, head_dim=c["attention_head_dim"]
    )  # fmt: skip
    act = golden.activation(c["activation"].removesuffix("-approximate (tanh)") + "_tanh")
    ffn = MLP.Config(act=act, ratio=c["ff_mult"])
    block = ExpertAdaLN(ExpertAdaLN.Config(), site, attn=attn, ffn=ffn)
    weights = golden.weights()
    effformer.load_weights(block, weights, BLOCK)
    given = {name: golden.tensor(f"in.{name}") for name in ("hidden", "text", "temb")}
    hidden = given["hidden"].clone().requires_grad_()
    rope = Rope(golden.tensor("in.cos"), golden.tensor("in.sin"), interleaved=True)
    wording = Context(cond=given["temb"])
    video, text = block(hidden, given["text"], Context(cond=given["temb"], rope=rope), wording)
    golden.assert_close(video, "out.hidden")
    golden.assert_close(text, "out.text")
    loss = (video * golden.tensor("in.cotangent")).mean()
    golden.assert_close(loss, "out.loss")
    loss.backward()
    assert hidden.grad is not None
    golden.assert_close(hidden.grad, "grad.in.hidden")
    grads = BLOCK.from_ours({n: p.grad for n, p in block.named_parameters()}, None)  # type: ignore[misc]
    for key in ("attn1.to_q.weight", "norm1.linear.weight"):
        golden.assert_close(grads[key], f"grad.{key}")
    saved = BLOCK.from_ours(block.state_dict(), None)
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], value) for key, value in weights.items())
