"""TripoSG's autoencoder: farthest points, latents, distances, their gradients, losses and gradients of
these.
"""

from __future__ import annotations

import torch
from effformer.models import TripoSGVAE
from harness import Golden

import effformer
from effformer.nn.latents import Latents
from effformer.nn.points import farthest_points, field_losses, octave_features


def check(golden: Golden) -> None:
    model, c = build(golden), golden.config
    surface, points = golden.tensor("in.surface"), golden.tensor("in.points")
    few = surface[:, : 4 * c["num_tokens"], :3]
    golden.assert_close(farthest_points(few, c["num_tokens"]), "in.fps_idx")
    golden.assert_close(octave_features(points, c["embed_frequency"]), "out.point_embedding")
    with torch.no_grad():
        found = model.encode(surface, golden.tensor("in.query_surface"))
        golden.assert_close(torch.cat(found, dim=-1), "out.moments")
        golden.assert_close(found.kl(), "out.kl_sum")
        z = found.at(golden.tensor("in.eps"))
        golden.assert_close(z, "out.z")
        memory = model.decode(golden.tensor("out.z"))
        golden.assert_close(memory, "out.kv_cache")
        sdf = model.distances(memory, points)
        golden.assert_close(sdf[..., None], "out.sdf")
        golden.assert_close(-sdf[..., None], "out.decoder_sample")
        golden.assert_close(model.distances(memory, points, chunk=7)[..., None], "out.sdf")
    _check_losses(golden, model, found)


def _check_losses(golden: Golden, model: TripoSGVAE, found: Latents) -> None:
    c, memory, points = golden.config, golden.tensor("out.kv_cache"), golden.tensor("in.points")
    at = points.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.distances(memory, at).sum(), at)
    golden.assert_close(slope, "out.grad_xyz")
    losses = field_losses(
        lambda x: model.distances(memory, x),
        points,
        golden.tensor("in.sdf_gt"),
        golden.tensor("in.normal_gt"),
    )
    kl = found.kl().sum() / found.mean.numel()
    for name, value in zip(("sdf", "sn", "eik", "kl_mean"), (*losses, kl), strict=True):
        golden.assert_close(value.reshape(1), f"out.loss_{name}")
    weights = (1.0, c["lambda_sn"], c["lambda_eik"], c["lambda_kl"])
    total = sum(w * x for w, x in zip(weights, (*losses, kl), strict=True))
    golden.assert_close(total.reshape(1), "out.loss_total")
    total.backward()
    for ours, theirs in (("head", "proj_out"), ("embed_points", "proj_query")):
        grad = model.get_submodule(ours).weight.grad
        golden.assert_close(grad, f"grad.w.decoder.{theirs}.weight")


def build(golden: Golden) -> TripoSGVAE:
    c = golden.config
    golden.only("embed_include_pi", False, why="TripoSG has no other")
    model = effformer.build_model(
        "triposg-vae-tiny",
        dim=c["width_decoder"],
        encoder_dim=c["width_encoder"],
        depth=c["num_layers_encoder"] + c["num_layers_decoder"],
        encoder_depth=c["num_layers_encoder"],
        heads=c["num_attention_heads"],
        channels=c["latent_channels"],
        octaves=c["embed_frequency"],
    )
    assert isinstance(model, TripoSGVAE)
    assert effformer.load_weights(model, golden.weights()).layout == "official"
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    assert saved.keys() == golden.weights().keys()
    for key, value in golden.weights().items():
        assert torch.equal(saved[key], value), key
    return model.eval()
