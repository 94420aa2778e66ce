"""DiT: official blocks, conditioning, label drop, guidance and gradients."""

from __future__ import annotations

import torch
from effformer.models.dit import DiT
from harness import Golden

import effformer
from effformer.context import Context, Tap
from effformer.flow.diffusion import Diffusion
from effformer.flow.guidance import forward_with_cfg
from effformer.nn.embeddings import time_features


def build(golden: Golden, family: str) -> DiT:
    c = golden.config
    model = effformer.build_model(
        f"{family}-nano",
        input_size=c["input_size"],
        patch=c["patch_size"],
        channels=c["in_channels"],
        dim=c["hidden_size"],
        depth=c["depth"],
        heads=c["num_heads"],
        ffn={"ratio": float(c.get("mlp_ratio", 4.0))},
        num_classes=c["num_classes"],
        learn_sigma=c["learn_sigma"],
        label_dropout=c.get("class_dropout_prob", 0.1),
    )
    report = effformer.load_weights(model, golden.weights())
    assert report.layout == "official"
    assert isinstance(model, DiT)
    return model.eval()


def check(golden: Golden) -> None:
    model = build(golden, "dit")
    x, t, y = (golden.tensor(f"in.{name}") for name in "xty")
    _check_parts(golden, model, x, t, y)
    _check_output(golden, model, x, t, y)
    with torch.no_grad():
        if golden.meta.get("diffusion"):
            _check_diffusion(golden, model, x, y)
        if "out.cfg" in golden.tensors:
            cfg_x, cfg_t, cfg_y = (golden.tensor(f"in.cfg_{name}") for name in "xty")
            guided = forward_with_cfg(model, cfg_x, cfg_t, golden.meta["cfg_scale"], y=cfg_y)
            golden.assert_close(guided, "out.cfg")


def _check_parts(
    golden: Golden, model: DiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor
) -> None:
    tokens = model.patch_embed(x)
    golden.assert_close(tokens, "out.patch_tokens")
    golden.assert_close(time_features(t), "out.freq_embed")
    time, label = model.time_embed(t, x.dtype), model.label_embed(y)
    golden.assert_close(time, "out.t_emb")
    golden.assert_close(label, "out.y_emb")
    if "in.force_drop_ids" in golden.tensors:
        drop = golden.tensor("in.force_drop_ids") == 1
        golden.assert_close(model.label_embed(y, drop), "out.y_emb_dropped")
    tap = Tap(keep=("blocks.0.*",))
    ctx = Context(cond=time + label, time=time, grid=model.grid, tap=tap)
    h = tokens + model.pos_embed
    for i, block in enumerate(model.blocks):
        h = block(h, ctx)
        golden.assert_close(h, f"out.block{i}")
    golden.assert_close(tap.seen["blocks.0.attn"], "out.block0.attn")
    golden.assert_close(tap.seen["blocks.0.ffn"], "out.block0.mlp")
    golden.assert_close(model.final(h, time + label), "out.final_tokens")


def _check_output(
    golden: Golden, model: DiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor
) -> None:
    out = model(x, t, y)
    golden.assert_close(out, "out.y")
    loss = (out * golden.tensor("in.loss_weight")).mean()
    golden.assert_close(loss, "out.loss")
    loss.backward()
    ours = _official_gradients(model)
    for key in golden.keys("grad."):
        golden.assert_close(ours[key.removeprefix("grad.")], key)


def _check_diffusion(golden: Golden, model: DiT, x: torch.Tensor, y: torch.Tensor) -> None:
    """Official training losses, respaced posterior and DDIM."""
    variance = "learned-range" if golden.config["learn_sigma"] else "fixed-large"
    options = golden.meta["diffusion"]
    full = Diffusion.linear(1000, variance=variance)
    step, noise = golden.tensor("in.diff_t"), golden.tensor("in.diff_noise")
    loss = full.training_losses(model, x, step, noise, y=y)
    golden.assert_close(loss.x, "out.train.x_t")
    golden.assert_close(loss.loss, "out.train.loss")
    golden.assert_close(loss.mse, "out.train.mse")
    if loss.vb is not None:
        golden.assert_close(loss.vb, "out.train.vb")
    short = Diffusion.linear(1000, options["respacing"], variance=variance)
    assert list(short.timesteps) == golden.tensor("out.timestep_map").tolist()
    golden.assert_close(short.alphas_cumprod, "out.alphas_cumprod_respaced")
    index = torch.full((len(x),), options["idx"])
    posterior = short.p_mean_variance(model, x, index, y=y)
    golden.assert_close(posterior.mean, "out.p.mean")
    golden.assert_close(posterior.log_variance, "out.p.log_variance")
    golden.assert_close(posterior.data, "out.p.pred_xstart")
    golden.assert_close(short.ddim_step(model, x, index, y=y), "out.ddim.sample")
    golden.assert_close(short.sample(model, x, method="ddim", y=y), "out.ddim.full")


def _official_gradients(model: DiT) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return model.LAYOUTS[0].from_ours(grads, model.config)
