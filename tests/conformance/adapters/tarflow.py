"""TarFlow: latents of every map, log-determinants, gradients, denoising, and guided samples."""

from __future__ import annotations

from typing import Any

import torch
from effformer.models import TarFlow
from harness import Golden
from torch import Tensor

import effformer
from effformer.flow import Away, Likelihood, denoised, invert


def build(golden: Golden) -> TarFlow:
    c = golden.config
    model = effformer.build_model(
        "tarflow-tiny",
        dim=c["channels"],
        heads=c["channels"] // c["head_dim"],
        depth=c["num_blocks"] * c["layers_per_block"],
        flows=(c["layers_per_block"],) * c["num_blocks"],
        ffn={"ratio": float(c.get("expansion", 4))},
        channels=c["in_channels"],
        input_size=c["img_size"],
        patch=c["patch_size"],
        num_classes=c["num_classes"],
        volume_preserving=not c.get("nvp", True),
    )
    assert effformer.load_weights(model, golden.weights()).layout == "official"
    assert isinstance(model, TarFlow)
    return model.eval()


def check(golden: Golden) -> None:
    model = build(golden)
    labels = {"y": golden.tensor("in.y")} if model.config.num_classes else {}
    _check_gradients(golden, model, labels)
    with torch.no_grad():
        _check_latents(golden, model, labels)
        _check_samples(golden, model, labels)
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    weights = golden.weights()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], value) for key, value in weights.items())


def pictures(model: TarFlow, tokens: Tensor) -> Tensor:
    size = model.config.input_size
    return model.image(tokens, tokens.new_empty(len(tokens), model.config.channels, size, size))


def _raw(model: TarFlow, z: Tensor) -> Tensor:
    """What the last map made, as patches; theirs are not divided by the prior's deviation."""
    return model.prior(model.tokens(z))


def _per_number(golden: Golden, model: TarFlow, log_det: Tensor) -> Tensor:
    """Their log-determinant: a mean, without the prior's deviation."""
    made = log_det + 0.5 * model.variance.log().sum() if "variance" in model._buffers else log_det
    return made / golden.tensor("in.x")[0].numel()


def _check_latents(golden: Golden, model: TarFlow, labels: dict[str, Tensor]) -> None:
    x = golden.tensor("in.x")
    cases: dict[str, dict[str, Any]] = {"": labels, "_uncond": {}}
    if labels:
        y = golden.tensor("in.y_dropped")
        cases["_dropped"] = {"y": y.clamp(min=0), "drop": y < 0}
    for name, cond in cases.items():
        z, log_det = model(x, **cond)
        golden.assert_close(_raw(model, z), f"out.z{name}")
        golden.assert_close(_per_number(golden, model, log_det), f"out.logdet{name}")
    tokens = model.tokens(x)
    for i, one in enumerate(model.maps(x, **labels)):
        tokens = one(tokens).z
        golden.assert_close(tokens, f"out.block{i}")


def _check_gradients(golden: Golden, model: TarFlow, labels: dict[str, Tensor]) -> None:
    """With the prior N(0, I), under which they train."""
    x, noise = golden.tensor("in.x").clone().requires_grad_(), golden.config["noise_std"]
    variance = model.variance.clone() if "variance" in model._buffers else None
    if variance is not None:
        model.variance.fill_(1)
    out = Likelihood(Likelihood.Config(noise=0.0))(model, x, **labels)
    golden.assert_close(out.loss, "out.loss")
    out.loss.backward()
    assert x.grad is not None
    golden.assert_close(x.grad, "grad.x")
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    official = model.LAYOUTS[0].from_ours(grads, model.config)
    for key in golden.keys("grad."):
        if key != "grad.x":
            golden.assert_close(official[key.removeprefix("grad.")], key)
    golden.assert_close(denoised(model, x.detach(), noise, **labels), "out.denoised")
    if variance is not None:
        model.variance.copy_(variance)


def _check_samples(golden: Golden, model: TarFlow, labels: dict[str, Tensor]) -> None:
    c, noise = golden.config, pictures(model, golden.tensor("in.noise"))
    z = model(golden.tensor("in.x"), **labels).z
    golden.assert_close(invert(model, z, **labels).x, "out.recon_from_z")
    golden.assert_close(invert(model, noise, **labels).x, "out.sample")
    null: dict[str, Any] = {"y": None}
    rules = {
        "sample_cfg_annealed": (Away(scale=c["guidance"], weak=null, rising=True), labels),
        "sample_cfg_const_b": (Away(scale=c["guidance"], weak=null, moves="shift"), labels),
        "sample_temp_guided": (
            Away(
                scale=c["guidance"], weak={"temperature": c["attn_temp_uncond"]}, rising=True
            ),
            {},
        ),
    }  # fmt: skip
    for name, (rule, cond) in rules.items():
        if f"out.{name}" in golden.tensors:
            golden.assert_close(invert(model, noise, guidance=rule, **cond).x, f"out.{name}")
