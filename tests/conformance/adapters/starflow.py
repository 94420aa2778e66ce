"""STARFlow: sequences before every map, log-determinants, gradients, denoising, samples and guidance."""

from __future__ import annotations

import torch
from closeness import assert_close
from effformer.models import STARFlow
from harness import Golden
from torch import Tensor

import effformer
from effformer.flow import Away, Inversion, Likelihood, denoised, invert


class Pair:
    """Log-scale and shift of a map."""

    def __init__(self, log_scale: Tensor, shift: Tensor) -> None:
        self.log_scale, self.shift = log_scale, shift


def build(golden: Golden) -> STARFlow:
    c, weights = golden.config, golden.weights()
    golden.only("rope", True, why="places are told by rotary tables")
    golden.only("sos", True, why="a start token predicts the first one")
    golden.only("cond_top_only", True, why="the last map alone reads the text")
    golden.only("top_block_channels", None, c["channels"], why="all maps are equally wide")
    layers, dim = tuple(c["layers_per_block"]), c["channels"]
    shapes = {key.split("attn_blocks.")[-1]: value.shape for key, value in weights.items()}
    rows = shapes.get("0.attention.qkv.weight", (3 * dim,))[0] - dim  # of keys and values
    gated = "0.mlp.gate_proj.weight" in shapes
    bias = not weights or "0.attention.qkv.bias" in shapes
    inner = shapes.get(f"0.mlp.{'gate_proj' if gated else 'main.0'}.weight", (4 * dim,))[0]
    rms = bool(weights) and "0.attention.norm.bias" not in shapes
    model = effformer.build_model(
        "starflow-tiny",
        dim=dim,
        heads=dim // c["head_dim"],
        depth=sum(layers),
        flows=layers,
        channels=c["in_channels"],
        patch=c["patch_size"],
        input_size=c["img_size"],
        text_dim=c["txt_dim"] or None,
        text_length=c["txt_size"] or 1,
        norm="rms" if rms else "layer",
        last_norm=c["use_final_norm"],
        clip=float(c["soft_clip"]) if c["soft_clip"] else None,
        scale="softplus" if c["use_softplus"] else "exp",
        first="reversed" if c["seq_order"] == "L2R" else "raster",
        attn={
            "qk_norm": "0.attention.query_norm.weight" in shapes, "qkv_bias": bias,
            "proj_bias": bias, "kv_heads": None if rows == 2 * dim else rows // 2 // c["head_dim"],
        },
        ffn={
            "name": "geglu" if gated else "mlp", "act": "gelu-tanh" if gated else "gelu",
            "hidden": inner, "bias": bias,
        },
    )  # fmt: skip
    assert effformer.load_weights(model, weights).layout == "official"
    assert isinstance(model, STARFlow)
    return model.eval()


def check(golden: Golden) -> None:
    model = build(golden)
    text = {"text": golden.tensor("in.y")} if model.config.text_dim else {}
    x = golden.tensor("in.x")
    _check_gradients(golden, model, x, text)
    with torch.no_grad():
        _check_maps(golden, model, x, text)
        _check_samples(golden, model, text)
        _check_guidance(golden)
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    weights = golden.weights()
    assert saved.keys() == weights.keys()
    assert_close(saved, weights, rtol=1e-6, atol=1e-6)


def _check_maps(golden: Golden, model: STARFlow, x: Tensor, text: dict[str, Tensor]) -> None:
    tokens, made = model.tokens(x), iter(model.maps(x, **text))
    for i, count in enumerate(model.config.flows):
        golden.assert_close(model.image(tokens, x).movedim(1, -1), f"out.seq{i}")
        if not count:
            continue
        one = next(made)
        log_scale = one.affine(one.order(tokens)).log_scale
        golden.assert_close(-log_scale, f"out.logdet{i}")
        tokens = one(tokens).z
    last = len(model.config.flows)
    golden.assert_close(model.image(tokens, x).movedim(1, -1), f"out.seq{last}")
    golden.assert_close(model(x, **text).z, "out.z")


def _check_gradients(golden: Golden, model: STARFlow, x: Tensor, text: dict[str, Tensor]) -> None:
    leaf = x.clone().requires_grad_()
    out = Likelihood(Likelihood.Config(noise=0.0))(model, leaf, **text)
    golden.assert_close(out.loss, "out.loss")
    golden.assert_close(0.5 * out.z.square().mean(), "out.loss_z")
    golden.assert_close(-out.log_det.mean() / x[0].numel(), "out.loss_logdet")
    out.loss.backward()
    assert leaf.grad is not None
    golden.assert_close(leaf.grad, "grad.x")
    sigma = golden.config["self_denoise_sigma"]
    golden.assert_close(denoised(model, x, sigma, **text), "out.self_denoised")


def _check_samples(golden: Golden, model: STARFlow, text: dict[str, Tensor]) -> None:
    c, noise = golden.config, golden.tensor("in.noise")
    golden.assert_close(invert(model, golden.tensor("out.z"), **text).x, "out.recon")
    golden.assert_close(invert(model, noise, **text).x, "out.sample")
    size = c["jacobi_block_size"]
    early = Inversion(segment=size, iterations=32, tolerance=1e-3, measure="relative")
    golden.assert_close(invert(model, noise, early, **text).x, "out.sample_jacobi_th1e-3")
    if text:
        weak = {"text": golden.tensor("in.y_null")}
        rule = Away(scale=c["guidance"], weak=weak, rule="gaussian")
        golden.assert_close(invert(model, noise, guidance=rule, **text).x, "out.sample_cfg")


def _check_guidance(golden: Golden) -> None:
    """Conditional in the first half, unconditional in the second; the answer stands in both."""
    own, weak = (
        Pair(sigma.log(), mu)
        for mu, sigma in zip(
            golden.tensor("in.guid_mu").chunk(2),
            golden.tensor("in.guid_sigma").chunk(2),
            strict=True,
        )
    )
    rule = Away(scale=golden.config["guidance"], weak={"text": None}, rule="gaussian")
    log_scale, mean = rule.mix(own, weak, torch.ones(1))
    golden.assert_close(torch.cat([mean, mean]), "out.guid_mu")
    golden.assert_close(torch.cat([log_scale, log_scale]).exp(), "out.guid_sigma")
