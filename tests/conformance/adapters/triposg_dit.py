"""TripoSG's transformer with one and two conditions: the time, every block, scaled conditions, gradients."""

from __future__ import annotations

import torch
from effformer.models import TripoSG
from harness import Golden

import effformer


def check(golden: Golden) -> None:
    model = build(golden)
    x = golden.tensor("in.x").clone().requires_grad_()
    given = {"t": golden.tensor("in.timestep_1000"), "image": golden.tensor("in.cond1")}
    if "in.cond2" in golden.tensors:
        given["second"] = golden.tensor("in.cond2")
    left: dict[int, torch.Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, args, out, i=i: left.__setitem__(i, out))
    v = model(x, **given)
    golden.assert_close(model.time_embed(given["t"], x.dtype), "out.temb_token")
    for i, made in left.items():
        golden.assert_close(made, f"out.block{i}")
    golden.assert_close(v, "out.v")
    loss = v.square().mean()
    golden.assert_close(loss.reshape(1), "out.loss_mean_sq")
    loss.backward()
    assert x.grad is not None
    golden.assert_close(x.grad, "grad.x")
    if "second" in given:
        with torch.no_grad():
            golden.assert_close(
                model(x, **given, image_scale=0.7, second_scale=0.3),
                "out.v_scaled",
            )
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    assert saved.keys() == golden.weights().keys()
    for key, value in golden.weights().items():
        assert torch.equal(saved[key], value), key


def build(golden: Golden) -> TripoSG:
    c = golden.config
    golden.only("qkv_bias", False, why="TripoSG has no other")
    model = effformer.build_model(
        "triposg-nano",
        dim=c["width"],
        depth=c["num_layers"],
        heads=c["num_attention_heads"],
        channels=c["in_channels"],
        image_dim=c["cross_attention_dim"],
        second_dim=c["cross_attention_2_dim"],
        ffn={"ratio": c["mlp_ratio"]},
    )
    assert isinstance(model, TripoSG)
    report = effformer.load_weights(model, golden.weights())
    assert report.layout == "official"
    return model.eval()
