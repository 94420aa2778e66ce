"""LightningDiT: network, conditioning, rotary tables, guidance, loss terms and gradients."""

from __future__ import annotations

from typing import Any

import torch
from effformer.models import LightningDiT
from harness import Golden

import effformer
from effformer.flow import FlowMatching, adapt, cosine_distance, forward_with_cfg


def build(golden: Golden) -> LightningDiT:
    c = golden.config
    width = int(c["hidden"] * c["mlp_ratio"])
    swiglu = {"name": "swiglu", "hidden": int(2 / 3 * width)}
    options: dict[str, Any] = {
        "ffn": swiglu if c["use_swiglu"] else {"name": "mlp", "hidden": width},
        "norm": "rms" if c["use_rmsnorm"] else "layer",
        # the official layer norms of queries and keys keep the default of their framework
        "attn": {
            "qk_norm": c["use_qknorm"],
            "qk_norm_eps": 1e-6 if c["use_rmsnorm"] else 1e-5,
        },
        "block": {"name": "adaln-zero", "shift": not c["wo_shift"]},
        "learn_sigma": c["learn_sigma"],
    }
    if not c["use_rope"]:
        options["rope"] = None
    model = effformer.build_model(
        "lightningdit-nano",
        input_size=c["input_size"],
        patch=c["patch_size"],
        channels=c["in_channels"],
        dim=c["hidden"],
        depth=c["depth"],
        heads=c["heads"],
        num_classes=c["num_classes"],
        label_dropout=c.get("class_dropout_prob", 0.1),
        **options,
    )
    assert effformer.load_weights(model, golden.weights()).layout == "official"
    assert isinstance(model, LightningDiT)
    return model.eval()


def check(golden: Golden) -> None:
    model = build(golden)
    _check_forward(golden, model)
    _check_losses(golden, model)
    with torch.no_grad():
        _check_guidance(golden, model)
        _check_rope(golden, model)
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    assert saved.keys() == golden.weights().keys()


def _check_forward(golden: Golden, model: LightningDiT) -> None:
    x = golden.tensor("in.x").clone().requires_grad_()
    t, y = golden.tensor("in.t"), golden.tensor("in.y")
    ctx, h = model.context(x, t, y), model.embed(x)
    assert ctx.cond is not None
    golden.assert_close(ctx.cond, "out.c")
    for i, block in enumerate(model.blocks):
        h = block(h, ctx)
        golden.assert_close(h, f"out.block{i}")
    golden.assert_close(model.head(h, ctx), "out.v")
    v = adapt(model, "lightningdit")(x, t, y=y)
    golden.assert_close(v, "out.v")
    v.square().mean().backward()
    assert x.grad is not None
    golden.assert_close(x.grad, "grad.x")
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    official = model.LAYOUTS[0].from_ours(grads, model.config)
    for key in golden.keys("grad."):
        if key != "grad.x":
            golden.assert_close(official[key.removeprefix("grad.")], key)


def _check_losses(golden: Golden, model: LightningDiT) -> None:
    """The set's target is the velocity from no noise to itself."""
    v, target, t = (golden.tensor(key) for key in ("out.v", "in.ut", "in.t"))
    terms = []
    for cosine in (0.0, 1.0):
        objective = FlowMatching(FlowMatching.Config(cosine=cosine))
        out = objective(lambda x, t: v, target, noise=torch.zeros_like(target), t=t)
        terms.append(out.per_sample)
    golden.assert_close(terms[0], "out.mse")
    golden.assert_close(terms[1] - terms[0], "out.cos_loss")
    golden.assert_close(cosine_distance(v, target), "out.cos_loss")


def _check_guidance(golden: Golden, model: LightningDiT) -> None:
    c = golden.config
    x, t, y = (torch.cat([golden.tensor(f"in.{k}")] * 2) for k in "xty")
    y[len(y) // 2 :] = c["num_classes"]
    start = c.get("cfg_interval_start")
    guided = forward_with_cfg(
        model, x, t, c["cfg_scale"], interval=None if start is None else (start, 1.0), y=y
    )
    golden.assert_close(guided, "out.v_cfg")


def _check_rope(golden: Golden, model: LightningDiT) -> None:
    if model.config.rope is None or "in.rope_probe" not in golden.tensors:
        return
    probe = golden.tensor("in.rope_probe")
    (table,) = model.rope(model.rope.positions(model.grid), like=probe)
    golden.assert_close(table.query(probe), "out.rope_probe")
