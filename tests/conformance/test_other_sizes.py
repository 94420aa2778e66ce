"""Adapters take everything from the JSON: each runs on sets of our own making, of other sizes and
options, in single and double precision.

A set is made by running the adapter once on a model with random weights and taking what it would
have compared as the set's numbers; then the adapter runs on that set as on any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import GOLDEN, Golden, adapter_for
from torch import Tensor, randint, randn

import effformer
from effformer.checks import FormatError
from effformer.flow.diffusion import space_timesteps
from effformer.io import LoadReport
from effformer.layout import Layout

Options = dict[str, Any]
LATENT: Options = {
    "input_size": 8, "patch_size": 4, "in_channels": 3, "depth": 1, "num_classes": 5,
}  # fmt: skip
SPACE: Options = {
    "height": 24, "width": 16, "num_channels": 3, "pre_seq": 3, "after_seq": 5, "patch_size": 8,
    "dim": 20, "heads": 2, "dim_head": 6, "scale_dim": 3, "depth": 2, "Ndepth": 2,
}  # fmt: skip


def images(c: Options) -> Tensor:
    return randn(2, c["in_channels"], c["input_size"], c["input_size"])


def dit(c: Options) -> dict[str, Tensor]:
    steps = space_timesteps(1000, "ddim20")
    x, t, y = images(c), randint(1000, (2,)), randint(c["num_classes"], (2,))
    weight = randn(2, (2 if c["learn_sigma"] else 1) * c["in_channels"], *x.shape[2:])
    return {
        "in.x": x, "in.t": t, "in.y": y, "in.loss_weight": weight, "in.diff_t": t,
        "in.diff_noise": images(c), "out.timestep_map": torch.tensor(steps),
    }  # fmt: skip


def dit_alone(c: Options) -> dict[str, Tensor]:
    """Without a diffusion part."""
    given = dit(c)
    return {k: v for k, v in given.items() if k in ("in.x", "in.t", "in.y", "in.loss_weight")}


def dit_guided(c: Options) -> dict[str, Tensor]:
    x, y = images(c), randint(c["num_classes"], (2,))
    guided = {"in.cfg_x": torch.cat([x, x]), "in.cfg_t": randint(1000, (2,)).repeat(2)}
    guided["in.cfg_y"] = torch.cat([y, torch.full_like(y, c["num_classes"])])
    return dit_alone(c) | guided | {"out.cfg": guided["in.cfg_x"]}


def sit(c: Options) -> dict[str, Tensor]:
    """The network and its guidance, without paths, losses and samplers."""
    x1, t, y = images(c), torch.rand(2), randint(c["num_classes"], (2,))
    cfg_y = torch.cat([y, torch.full_like(y, c["num_classes"])])
    return {
        "in.x1": x1, "in.loss.t": t, "in.y": y, "in.cfg_x": torch.cat([x1, x1]), "in.cfg_y": cfg_y,
    }  # fmt: skip


def lightningdit(c: Options) -> dict[str, Tensor]:
    t, y = torch.rand(2), randint(c["num_classes"], (2,))
    return {"in.x": images(c), "in.t": t, "in.y": y, "in.ut": images(c), "out.v": images(c)}


def predformer(c: Options) -> dict[str, Tensor]:
    frame = (c["num_channels"], c["height"], c["width"])
    target = randn(2, c["after_seq"], *frame)
    cells = c["height"] * c["width"] // c["patch_size"] ** 2
    tokens = randn(2 * c["pre_seq"] * cells, c["dim"])
    return {
        "in.x": randn(2, c["pre_seq"], *frame), "in.target": target, "out.y": target,
        "out.tokens_before_head": tokens, "out.loss": randn(()),
    }  # fmt: skip


def gpt(c: Options) -> dict[str, Tensor]:
    shape = (3, c["block_size"])
    ids = {k: randint(c["vocab_size"], shape) for k in ("in.idx", "in.targets")}
    return ids | {"out.loss": randn(1)}


def vision(c: Options) -> dict[str, Tensor]:
    return {"in.image": randn(2, 1, c["img_size"], c["img_size"])}


def operator(c: Options) -> dict[str, Tensor]:
    grid, window = (5, 4), c["in_time_window"]
    axes = {
        f"in.pos_{x}": torch.linspace(0, 1, n)[:, None] for x, n in zip("xy", grid, strict=True)
    }
    made = {
        "in.u": randn(2, window, *grid, c["in_dim"]),
        "in.target": randn(2, *grid, c["out_dim"]),
    }
    return axes | made


def token_flow(c: Options) -> dict[str, Tensor]:
    x = randn(2, c["in_channels"], c["img_size"], c["img_size"])
    places = (c["img_size"] // c["patch_size"]) ** 2
    noise = randn(2, places, c["in_channels"] * c["patch_size"] ** 2)
    made = {"in.x": x, "in.noise": noise}
    if c["num_classes"]:
        made |= {"in.y": torch.tensor([0, 1]), "in.y_dropped": torch.tensor([-1, 1])}
    return made


def starflow(c: Options) -> dict[str, Tensor]:
    size, words = (2, c["in_channels"], *c["input_hw"]), (2, c["txt_size"], c["txt_dim"])
    made = {"in.x": randn(size), "in.noise": randn(size), "out.z": 0.1 * randn(size)}
    made |= {"in.guid_mu": randn(2, 3, 4), "in.guid_sigma": torch.rand(2, 3, 4) + 0.5}
    if c["txt_dim"]:
        made |= {"in.y": randn(words), "in.y_null": randn(words)}
    return made


Case = tuple[str, Options, Options, Callable[[Options], dict[str, Tensor]]]
RESPACED = {"diffusion": {"respacing": "ddim20", "idx": 3}}
PLAIN = {"use_swiglu": False, "use_rmsnorm": False, "use_rope": False, "learn_sigma": True}
CASES: dict[str, Case] = {
    "dit without sigma": (
        "dit", {**LATENT, "hidden_size": 40, "num_heads": 5, "learn_sigma": False}, RESPACED, dit,
    ),
    "dit without null label": (
        "dit", {**LATENT, "class_dropout_prob": 0.0, "mlp_ratio": 2.5}, RESPACED, dit,
    ),
    "dit without diffusion": ("dit", {**LATENT, "hidden_size": 24}, {"diffusion": {}}, dit_alone),
    "dit with guidance alone": ("dit", {**LATENT, "depth": 2}, {"diffusion": {}}, dit_guided),
    "sit without samplers": ("sit", {**LATENT, "hidden_size": 24}, {"runs": []}, sit),
    "plain lightningdit": (
        "lightningdit", {**LATENT, **PLAIN, "hidden": 24, "heads": 3, "use_qknorm": True}, {},
        lightningdit,
    ),
    "lightningdit without shift": (
        "lightningdit", {**LATENT, "wo_shift": True, "cfg_interval_start": None}, {}, lightningdit,
    ),
    "predformer": ("predformer_tsst", SPACE, {"variant": "sts"}, predformer),
    "predformer, one head": (
        "predformer_facst", {**SPACE, "heads": 1, "dim_head": 20, "after_seq": 2}, {}, predformer,
    ),
    "gpt": (
        "flow-attention-gpt",
        {"n_layer": 1, "n_head": 5, "n_embd": 20, "vocab_size": 11, "block_size": 7}, {}, gpt,
    ),
    "vision": (
        "flow-attention-vision",
        {"embed_dim": [8, 8, 16, 24], "img_size": 32, "num_heads": 4, "mlp_ratio": 2.5}, {}, vision,
    ),
    "unconditional tarflow": (
        "tarflow",
        {"num_classes": 0, "channels": 16, "head_dim": 8, "img_size": 6, "num_blocks": 2}, {}, token_flow,
    ),
    "starflow of a wide grid": (
        "starflow",
        {
            "input_hw": [2, 3], "layers_per_block": [1, 0, 1], "use_softplus": False,
            "use_final_norm": False, "soft_clip": 0, "seq_order": "R2L", "txt_size": 4,
        },
        {}, starflow,
    ),
    "operator on a plane": (
        "ifactformer_model_m",
        {"in_dim": 2, "out_dim": 4, "in_time_window": 3, "dim": 16, "heads": 3, "n_layer": 2},
        {"grid": [5, 4]}, operator,
    ),
}  # fmt: skip


class Recorder(Golden):
    """Keeps what an adapter would compare, and the weights that a model started with."""

    def assert_close(self, actual: Tensor, key: str, **_: Any) -> None:
        self.tensors[key] = actual.detach().clone()

    def load_weights(self, model: Any, *_: Any) -> LoadReport:
        layout: Layout = next(lay for lay in model.LAYOUTS if _writes(lay, model))
        official = layout.from_ours(dict(model.state_dict()), model.config)
        self.tensors.update({f"w.{key}": value.clone() for key, value in official.items()})
        return LoadReport(layout=layout.name, missing=(), unexpected=(), reshaped=())


def _writes(layout: Layout, model: Any) -> bool:
    try:
        official = layout.from_ours(dict(model.state_dict()), model.config)
    except FormatError:
        return False
    return layout.recognise(official.keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_runs_on_other_sizes(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes, facts, draw = case
    meta = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8")) | facts
    meta["config"] |= changes
    given = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in draw(meta["config"]).items()
    }
    made, adapter = Recorder(f"{name}_other", meta, dict(given)), adapter_for(name)
    assert adapter is not None
    with made.precision():
        assert torch.get_default_dtype() == dtype
        with monkeypatch.context() as patch:
            patch.setattr(effformer, "load_weights", made.load_weights)
            adapter(made)
        adapter(Golden(made.name, meta, made.tensors))
    assert len(made.tensors) > len(given)
