"""SANA and SANA-Sprint, the parts of the first block: linear attention and FFN."""

from __future__ import annotations

import torch
from effformer.models.layouts.sana import ATTENTION, MIX_FFN
from harness import Golden

import effformer
from effformer.attention import Attention, Sana
from effformer.context import Context
from effformer.ffn import GLUMBConv
from effformer.site import NormRule, Site

QK_NORM_EPS = 1e-5  # the reference library's, which the sets do not name
BLOCK = "transformer_blocks.0"


def check(golden: Golden) -> None:
    with torch.no_grad():
        _check_attention(golden)
        _check_ffn(golden)


def _check_attention(golden: Golden) -> None:
    c = golden.config
    golden.only("qk_norm", None, "rms_norm_across_heads", why="SANA has no other")
    config = Attention.Config(
        core=Sana.Config(eps=c["linear_attn_eps"]),
        qkv_bias=c["attention_bias"],
        qk_norm="across-heads" if c["qk_norm"] else False,
        head_dim=c["head_dim"],
    )
    x = golden.tensor("out.block0.attn1_in")
    site = Site(dim=x.shape[-1], heads=c["heads"], norm=NormRule(kind="rms", eps=QK_NORM_EPS))
    mixer = Attention(config, site).eval()
    effformer.load_weights(mixer, golden.weights(f"{BLOCK}.attn1."), ATTENTION)
    golden.assert_close(mixer(x), "out.block0.attn1_out")


def _check_ffn(golden: Golden) -> None:
    image = golden.tensor("out.block0.ff_in")
    part = GLUMBConv(GLUMBConv.Config(ratio=golden.config["mlp_ratio"]), Site(dim=image.shape[1]))
    effformer.load_weights(part.eval(), golden.weights(f"{BLOCK}.ff."), MIX_FFN)
    x = image.flatten(2).transpose(1, 2)
    y = part(x, Context(grid=tuple(image.shape[2:])))
    golden.assert_close(y.transpose(1, 2).unflatten(2, image.shape[2:]), "out.block0.ff_out")
