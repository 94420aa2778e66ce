"""PredFormer: all nine arrangements, the first unit, gradients where the set has them."""

from __future__ import annotations

import torch
from effformer.models import PredFormer
from harness import Golden
from torch import Tensor

import effformer
from effformer.attention import Lines
from effformer.context import Context

LAYERS = {
    "full": "f", "facst": "st", "facts": "ts", "binst": "st", "bints": "ts", "tst": "tst",
    "sts": "sts", "tsst": "tsst", "stts": "stts",
}  # fmt: skip


def check(golden: Golden) -> None:
    model, layout = build(golden)
    x = golden.tensor("in.x").requires_grad_()
    frames, rows, columns = model.grid_of(x)
    positions = model.positions.unflatten(0, (1, frames, rows * columns))
    golden.assert_close(positions, "buf.pos_embedding")
    _check_first_unit(golden, model, x)
    ctx = Context(grid=(frames, rows, columns))
    tokens = model.encode(model.embed(x), ctx)
    golden.assert_close(
        tokens.reshape_as(golden.tensor("out.tokens_before_head")), "out.tokens_before_head"
    )
    y = model.predict(x, golden.tensor("out.y").shape[1])
    golden.assert_close(y, "out.y")
    if "out.loss" in golden.tensors:
        loss = (y - golden.tensor("in.target")).square().mean()
        golden.assert_close(loss, "out.loss")
        loss.backward()
        _check_gradients(golden, model, x, layout)


def build(golden: Golden) -> tuple[PredFormer, str]:
    c, variant = golden.config, golden.meta["variant"]
    deep = c["Ndepth"] if variant in ("full", "facst", "facts") else c["depth"]
    layers = 1 if variant in ("full", "facst", "facts") else c["Ndepth"]
    axes = "".join(letter * deep for letter in LAYERS[variant])
    whole = c["heads"] == 1 and c["dim_head"] == c["dim"]
    model = effformer.build_model(
        "predformer-tiny",
        dim=c["dim"],
        depth=layers * len(axes),
        heads=c["heads"],
        axes=axes,
        attn={"head_dim": c["dim_head"], "proj": not whole},
        ffn={"ratio": float(c["scale_dim"])},
        block={"unit": deep},
        dropout=c["dropout"],
        attn_dropout=c["attn_dropout"],
        drop_path=c["drop_path"],
        frames=c["pre_seq"],
        channels=c["num_channels"],
        size=(c["height"], c["width"]),
        patch=c["patch_size"],
        transposed_head=variant == "facst",
    )
    assert isinstance(model, PredFormer)
    report = effformer.load_weights(model, golden.weights())
    assert (report.missing, report.unexpected) == ((), ())
    return model.eval(), report.layout


def _check_first_unit(golden: Golden, model: PredFormer, x: Tensor) -> None:
    grid, h = model.grid_of(x), model.embed(x)
    over = {"t": "t", "s": "hw", "f": "thw"}[model.config.axes[0]]
    lines = Lines(grid, over)
    golden.assert_close(lines.fold(h), "in.first_unit")
    for block in model.blocks[: model.config.block.unit]:
        h = block(h, Context(grid=grid))
    golden.assert_close(lines.fold(h), "out.first_unit")


def _check_gradients(golden: Golden, model: PredFormer, x: Tensor, layout: str) -> None:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    (official,) = (one for one in model.LAYOUTS if one.name == layout)
    theirs: dict[str, Tensor] = official.from_ours(grads, model.config)
    assert x.grad is not None
    theirs["in.x"] = x.grad
    for key in golden.keys("grad."):
        golden.assert_close(theirs[key.removeprefix("grad.")], key)
    assert torch.isfinite(x.grad).all()
