"""MMDiT of SD3 and SD3.5: network, both streams behind every block, skipped blocks and gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from effformer.models import MMDiT
from harness import Golden

import effformer
from effformer.context import Context
from effformer.nn.embeddings import time_features


def build(golden: Golden) -> MMDiT:
    c = golden.config
    dual = c["dual_attention_layers"]
    assert dual == list(range(len(dual)))
    model = effformer.build_model(
        "mmdit-nano",
        dim=c["hidden"],
        depth=c["depth"],
        heads=c["heads"],
        patch=c["patch_size"],
        channels=c["in_channels"],
        text_dim=c["context_in"],
        pooled_dim=c["pooled_in"],
        input_size=c["patch_size"] * 2,
        table_size=c["pos_embed_max_size"],
        table_base=c["pos_embed_base_size"],
        attn={"qk_norm": c["qk_norm"] is not None, "qk_norm_eps": c["qk_norm_eps"]},
        block={"name": "joint", "dual": len(dual)},
        ffn={"ratio": c["mlp_ratio"]},
    )
    assert isinstance(model, MMDiT)
    table = model.positions(c["pos_embed_max_size"], c["pos_embed_max_size"]).clone()
    golden.assert_close(table, "w.pos_embed")
    report = effformer.load_weights(model, golden.weights())
    assert report.layout == "official"
    return model.eval()


def check(golden: Golden) -> None:
    model = build(golden)
    x = golden.tensor("in.x").clone().requires_grad_()
    text = golden.tensor("in.context").clone().requires_grad_()
    t, pooled = golden.tensor("in.timestep_1000"), golden.tensor("in.y_pooled")
    _check_blocks(golden, model)
    with torch.no_grad():
        skipped = model(x, t, text, pooled, skip_layers=golden.config["skip_layers"])
    golden.assert_close(skipped, "out.v_skip_layers")
    v = model(x, t, text, pooled)
    golden.assert_close(v, "out.v")
    loss = v.square().mean()
    golden.assert_close(loss.view(1), "out.loss_mean_sq")
    loss.backward()
    assert x.grad is not None
    assert text.grad is not None
    golden.assert_close(x.grad, "grad.x")
    golden.assert_close(text.grad, "grad.context")
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    official = model.LAYOUTS[0].from_ours(grads, model.config)
    for key in golden.keys("grad.w."):
        golden.assert_close(official[key.removeprefix("grad.w.")], key)
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    assert saved.keys() == golden.weights().keys()
    for key, value in golden.weights().items():
        assert torch.equal(saved[key], value), key


@torch.no_grad()
def _check_blocks(golden: Golden, model: MMDiT) -> None:
    x, t = golden.tensor("in.x"), golden.tensor("in.timestep_1000")
    golden.assert_close(time_features(t), "out.t_freq256")
    cond = model.time_embed(t) + model.pooled_embed(golden.tensor("in.y_pooled"))
    golden.assert_close(cond, "out.c_mod")
    grid = x.shape[2] // model.config.patch, x.shape[3] // model.config.patch
    h = model.patch_embed(x) + model.positions(*grid)
    y = model.text_embed(golden.tensor("in.context"))
    golden.assert_close(h, "out.x_embed")
    golden.assert_close(y, "out.context_embed")
    ctx = Context(cond=cond)
    for i, block in enumerate(model.blocks):
        h, y = block(h, y, replace(ctx, grid=grid), ctx)
        golden.assert_close(h, f"out.block{i}.x")
        if f"out.block{i}.context" in golden.tensors:
            golden.assert_close(y, f"out.block{i}.context")
