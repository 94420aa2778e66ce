"""One packed post-norm layer in ByteTransformer's weight layout, with both sets of constants."""

from __future__ import annotations

import torch
from effformer.models.layouts.bert import BYTETRANSFORMER_LAYER
from harness import Golden

import effformer
from effformer.attention import Attention
from effformer.blocks import PostNorm
from effformer.context import Context, Packing
from effformer.ffn import MLP
from effformer.site import NormRule, Site

# the repository's own test and its kernels differ in the norm's epsilon and in the GELU
CASES = {"out.test_reference": (1e-5, "gelu"), "out.kernel_math": (1e-6, "gelu-tanh")}


def check(golden: Golden) -> None:
    c = golden.config
    weights = golden.weights()
    x, mask = golden.tensor("in.from_tensor"), golden.tensor("in.attention_mask").bool()
    packing = Packing.from_mask(mask)
    golden.assert_close(packing.indices, "out.word_idx")
    golden.assert_close(packing.offsets, "out.batch_idx")
    for key, (eps, act) in CASES.items():
        site = Site(dim=c["head_num"] * c["head_size"], heads=c["head_num"], norm=NormRule(eps=eps))
        ffn = MLP.Config.from_dict({"hidden": weights["inter_bias"].shape[0], "act": act})
        block = PostNorm(PostNorm.Config(), site, attn=Attention.Config(), ffn=ffn).eval()
        effformer.load_weights(block, weights, BYTETRANSFORMER_LAYER)
        with torch.no_grad():
            packed = packing.unpack(block(packing.pack(x), Context(packing=packing)))
            padded = block(x, Context(mask=mask)) * mask.unsqueeze(-1)
        golden.assert_close(packed, key)
        golden.assert_close(padded, key)
