"""RecTok's tokenizer: angles, latents, noisy latents, features, images, losses, gradients."""

from __future__ import annotations

import math

import torch
from effformer.models import RecTok
from effformer.models.rectok import Draws, hinge_losses, unit_angles
from harness import Golden

import effformer


def check(golden: Golden) -> None:
    model, c = build(golden), golden.config
    x = golden.tensor("in.x")
    angles = unit_angles(model.side, c["vit"]["width"] // c["vit"]["heads"])
    golden.assert_close(torch.cat([angles.cos(), angles.sin()], dim=-1), "out.rope_table")
    golden.assert_close(torch.tensor([model.shift]), "out.timestep_shift")
    with torch.no_grad():
        found = model.encode(x)
        golden.assert_close(torch.cat(found, dim=-1), "out.eval_moments")
        latent = found.mean.transpose(1, 2).unflatten(2, (model.side, model.side))
        golden.assert_close(latent, "out.eval_latent")
        golden.assert_close(((model(x) + 1) / 2).clamp(0, 1), "out.eval_recon01")
    _check_training(golden, model)
    judged, made = hinge_losses(golden.tensor("in.logits_real"), golden.tensor("in.logits_fake"))
    golden.assert_close(judged.reshape(1), "out.hinge_d")
    golden.assert_close(made.reshape(1), "out.gan_g")


def _check_training(golden: Golden, model: RecTok) -> None:
    c, x, features = golden.config, golden.tensor("in.x"), golden.tensor("in.vfm_features")
    golden.only("noise_schedule", "shift", why="RecTok trains so")
    kept = golden.tensor("in.perm")[:, : math.ceil(model.side**2 * (1 - c["mask_ratio"]))]
    u = golden.tensor("in.t_uniform")
    t = u * model.shift / (1 + (model.shift - 1) * u)
    golden.assert_close(t, "out.t")
    draws = Draws(kept, t, golden.tensor("in.eps_posterior"), golden.tensor("in.eps_flow"))
    with torch.no_grad():
        found = model.encode(x, kept)
        golden.assert_close(found.mean, "out.posterior_mean")
        golden.assert_close(found.logvar, "out.posterior_logvar")
        noisy = (1 - t) * found.at(draws.posterior) + t * model.config.gamma * draws.flow
        golden.assert_close(noisy, "out.z_t")
        golden.assert_close(model.describe(noisy, kept), "out.sem_pred")
        golden.assert_close(model.decode(noisy, kept), "out.recon")
    losses = model.losses(x, features, draws)
    for name, value in zip(("rec_l2_01", "kl", "sem_cosine"), losses, strict=True):
        golden.assert_close(value.reshape(1), f"out.{name}")
    total = losses.total(c["kl_weight"])
    golden.assert_close(total.reshape(1), "out.total_wo_lpips_gan")
    total.backward()
    for ours, theirs in (
        (model.mask_token, "w.decoder.mask_token"),
        (model.to_latents.weight, "w.encoder.latent_head.weight"),
        (model.mask_feature, "w.sem.mask_embedding"),
    ):
        assert ours.grad is not None
        golden.assert_close(ours.grad, f"grad.{theirs}")


def build(golden: Golden) -> RecTok:
    c = golden.config
    vit, small = c["vit"], c["sem_decoder"]
    model = effformer.build_model(
        "rectok-tiny",
        dim=vit["width"],
        depth=vit["layers"],
        heads=vit["heads"],
        input_size=c["img_size"],
        patch=c["patch_size"],
        channels=c["token_channels"],
        features=c["sem_embed_dim"],
        describer_dim=small["width"],
        describer_depth=small["layers"],
        describer_heads=small["heads"],
        gamma=c["gamma"],
    )
    assert isinstance(model, RecTok)
    assert effformer.load_weights(model, golden.weights()).layout == "official"
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    for key, value in golden.weights().items():
        assert torch.equal(saved[key.replace(".vfm.", ".dinov3.")], value), key
    assert len(saved) == len(golden.weights())
    return model.eval()
