"""SANA and SANA-Sprint: the parts of the first block, the network, and gradients."""

from __future__ import annotations

import torch
from effformer.models import SANA
from effformer.models.layouts.sana import ATTENTION, MIX_FFN
from harness import Golden

import effformer
from effformer.attention import Attention, Sana
from effformer.context import Context, Tap
from effformer.ffn import GLUMBConv
from effformer.site import NormRule, Site

QK_NORM_EPS = 1e-5  # the reference library's, which the sets do not name
BLOCK = "transformer_blocks.0"


def check(golden: Golden) -> None:
    with torch.no_grad():
        _check_attention(golden)
        _check_ffn(golden)
    _check_network(golden)


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


def build(golden: Golden) -> SANA:
    c = golden.config
    normed = {"qk_norm": "across-heads" if c["qk_norm"] else False, "qk_norm_eps": QK_NORM_EPS}
    model = effformer.build_model(
        "sana-nano",
        dim=c["heads"] * c["head_dim"],
        depth=c["num_layers"],
        heads=c["heads"],
        channels=c["in_channels"],
        text_dim=c["caption_channels"],
        patch=c["patch_size"],
        attn={"qkv_bias": c["attention_bias"], "core": {"eps": c["linear_attn_eps"]}, **normed},
        cross={"heads": c["cross_heads"], "head_dim": c["cross_head_dim"], **normed},
        ffn={"ratio": c["mlp_ratio"]},
        guidance=0.1 if c["guidance_embeds"] else None,
    )
    assert isinstance(model, SANA)
    report = effformer.load_weights(model, golden.weights())
    assert report.layout == "diffusers"
    return model.eval()


def _check_network(golden: Golden) -> None:
    model = build(golden)
    x = golden.tensor("in.x").clone().requires_grad_()
    told = {}
    if golden.config["guidance_embeds"]:
        told["guidance_scale"] = golden.tensor("in.guidance") / 0.1  # the library is told a tenth
    mask = golden.tensor("in.caption_mask").bool()
    text, t = golden.tensor("in.caption"), golden.tensor("in.timestep_1000")
    tap = Tap(keep=("blocks.*",))
    v = model(x, t, text, text_mask=mask, tap=tap, **told)
    golden.assert_close(v, "out.v")
    golden.assert_close(tap.seen["blocks.0.attn"], "out.block0.attn1_out")
    v.square().mean().backward()
    assert x.grad is not None
    golden.assert_close(x.grad, "grad.x")
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    assert saved.keys() == golden.weights().keys()
    for key, value in golden.weights().items():
        assert torch.equal(saved[key], value), key
