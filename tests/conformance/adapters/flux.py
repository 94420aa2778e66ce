"""FLUX: both kinds of blocks, rotary tables, velocity, schedule, sampling, a reference and gradients."""

from __future__ import annotations

from functools import partial

import torch
from effformer.models import Flux
from harness import Golden
from torch import Tensor
from torch.nn import functional as F

import effformer
from effformer.context import Tap
from effformer.flow import TimeGrid, sample, shift_of_length
from effformer.nn.embeddings import time_features
from effformer.nn.patch import unpatchify


def build(golden: Golden) -> Flux:
    c = golden.config
    golden.only("qkv_bias", True, why="released models have biases there")
    model = effformer.build_model(
        "flux-tiny",
        dim=c["hidden_size"],
        heads=c["num_heads"],
        depth=c["depth"] + c["depth_single_blocks"],
        doubles=c["depth"],
        channels=c["latent_shape"][1],
        input_size=8,
        text_dim=c["context_in_dim"],
        pooled_dim=c["vec_in_dim"],
        guidance=c["guidance_embed"],
        ffn={"ratio": c["mlp_ratio"]},
        rope={"widths": tuple(c["axes_dim"]), "temperature": float(c["theta"])},
    )
    assert effformer.load_weights(model, golden.weights()).layout == "official"
    assert isinstance(model, Flux)
    return model.eval()


def check(golden: Golden) -> None:
    model = build(golden)
    given = {"text": golden.tensor("in.txt"), "pooled": golden.tensor("in.y")}
    given["guidance_scale"] = golden.tensor("in.guidance")
    _check_packing(golden)
    with torch.no_grad():
        _check_parts(golden, model, given)
        _check_sampling(golden, model, given)
    _check_gradients(golden, model, given)
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    weights = golden.weights()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], value) for key, value in weights.items())


def _image(golden: Golden, tokens: Tensor) -> Tensor:
    """The image of tokens (B, N, C p p)."""
    rows, columns = (n // 2 for n in golden.tensor("in.latent").shape[2:])
    return unpatchify(tokens, rows, columns, 2, channels_first=True)


def _tokens(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2).flatten(2).mT


def _check_packing(golden: Golden) -> None:
    latent = golden.tensor("in.latent")
    golden.assert_close(_tokens(latent), "in.img_packed", rtol=0, atol=0)
    assert torch.equal(_image(golden, golden.tensor("in.img_packed")), latent)
    golden.assert_close(_image(golden, golden.tensor("out.v_packed")), "out.v_latent")


def _check_parts(golden: Golden, model: Flux, given: dict[str, Tensor]) -> None:
    x, t, seen = golden.tensor("in.latent"), golden.tensor("in.t"), {}
    golden.assert_close(time_features(1000 * t), "out.t_emb256")
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({i: out}))
    tap = Tap(keep=("*.q",))
    conditioned = model.blocks[-1].modulation.register_forward_pre_hook(
        lambda _, args: seen.update(vec=args[0])
    )
    golden.assert_close(model(x, t, **given, tap=tap), "out.v_latent")
    conditioned.remove()
    golden.assert_close(seen["vec"], "out.vec")
    for i in range(len(model.blocks)):
        if i < model.config.doubles:
            for name, stream in zip(("img", "txt"), seen[i], strict=True):
                golden.assert_close(stream, f"out.double{i}.{name}")
        else:
            golden.assert_close(seen[i], f"out.single{i - model.config.doubles}.txt_img")
    _check_rope(golden, model, x)


def _check_rope(golden: Golden, model: Flux, x: Tensor) -> None:
    cells = tuple(n // 2 for n in x.shape[2:])
    words = golden.tensor("in.txt").shape[1]
    positions = model.rope.positions((1, *cells), front=words)
    golden.assert_close(positions[:, :words].expand(len(x), -1, -1), "in.txt_ids")
    golden.assert_close(positions[:, words:].expand(len(x), -1, -1), "in.img_ids")
    (rope,) = model.rope(positions, like=x)
    cos, sin = (table[:, ::2] for table in (rope.cos, rope.sin))
    turns = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    golden.assert_close(turns.expand(len(x), 1, -1, -1, -1, -1), "out.rope_matrix")


def _check_sampling(golden: Golden, model: Flux, given: dict[str, Tensor]) -> None:
    steps, latent = golden.config["steps"], golden.tensor("in.latent")
    grid = TimeGrid.uniform(steps)
    lengths = golden.tensor("in.seq_lens").tolist()
    factors = torch.tensor([shift_of_length(int(n)) for n in lengths])
    golden.assert_close(factors.log(), "out.mu")
    cells = latent.shape[2] * latent.shape[3] // 4
    shifts = {"": shift_of_length(cells), "_noshift": 1.0, "_seq4096": shift_of_length(4096)}
    for name, factor in shifts.items():
        times = torch.tensor(grid.shifted(factor).points)
        golden.assert_close(1 - times, f"out.schedule{name}")
    chosen = grid.shifted(shifts[""])
    if not torch.allclose(1 - torch.tensor(chosen.points), golden.tensor("out.schedule")):
        chosen = grid  # schnell
    run = partial(sample, model, latent, **given)
    golden.assert_close(_tokens(run(grid=chosen).x), "out.denoised_packed")
    reference = _image(golden, golden.tensor("in.ref_seq"))
    first = TimeGrid(chosen.points[:3])
    golden.assert_close(_tokens(run(grid=first, reference=reference).x), "out.denoised_kontext")


def _check_gradients(golden: Golden, model: Flux, given: dict[str, Tensor]) -> None:
    x = golden.tensor("in.latent").clone().requires_grad_()
    text = given["text"].clone().requires_grad_()
    loss = model(x, golden.tensor("in.t"), **given | {"text": text}).square().mean()
    golden.assert_close(loss[None], "out.loss_mean_sq")
    loss.backward()
    assert x.grad is not None
    assert text.grad is not None
    golden.assert_close(_tokens(x.grad), "grad.img_packed")
    golden.assert_close(text.grad, "grad.txt")
