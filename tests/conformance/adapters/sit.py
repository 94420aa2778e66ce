"""SiT: network, paths, conversions, losses, guidance, ODE and SDE sampling."""

from __future__ import annotations

from typing import Any

import torch
from effformer.models.sit import SiT
from harness import Golden

import effformer
from effformer.ffn import MLP
from effformer.flow import (
    FlowMatching,
    Path,
    TimeGrid,
    adapt,
    diffusion_coefficient,
    forward_with_cfg,
    get_path,
    sample,
)

FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
# torchdiffeq calls the 3/8 rule rk4
METHODS = {"rk4": "rk4-38", "Euler": "sde-euler", "Heun": "sde-heun"}


def build(golden: Golden) -> SiT:
    config = golden.config
    model = SiT(
        SiT.Config(
            input_size=config["input_size"],
            patch=config["patch_size"],
            channels=config["in_channels"],
            dim=config["hidden_size"],
            ffn=MLP.Config(ratio=float(config.get("mlp_ratio", 4.0))),
            depth=config["depth"],
            heads=config["num_heads"],
            num_classes=config["num_classes"],
            label_dropout=config.get("class_dropout_prob", 0.1),
            learn_sigma=config["learn_sigma"],
        )
    )
    assert effformer.load_weights(model, golden.weights()).layout == "official"
    return model.eval()


def check(golden: Golden) -> None:
    model = build(golden)
    for name in sorted({key.split(".")[2] for key in golden.keys("out.path.")}):
        _path(golden, name)
    _forward(golden, model)
    for key in golden.keys("out.loss."):
        _loss(golden, model, key)
    for run in golden.meta.get("runs", ()):
        kind = run["tag"].split(".")[0]
        (_ode if kind == "ode" else _sde)(golden, model, run)


def _path(golden: Golden, name: str) -> None:
    path, t = get_path(name.lower()), golden.tensor("in.tgrid")
    prefix = f"out.path.{name}"
    for key, f in (
        ("alpha", path.alpha), ("d_alpha", path.dalpha),
        ("sigma", path.sigma), ("d_sigma", path.dsigma),
    ):  # fmt: skip
        golden.assert_close(f(t), f"{prefix}.{key}")
    x, v, s = (golden.tensor(f"in.path.{k}") for k in ("x", "v", "s"))
    golden.assert_close(-path.ratio(t)[:, None] * x, f"{prefix}.drift")
    golden.assert_close(path.gain(t)[:, None], f"{prefix}.drift_var")
    for form in FORMS:
        norm = golden.meta["diffusion_norm"]
        coefficient = diffusion_coefficient(path, t, form.lower(), norm)  # type: ignore[arg-type]
        golden.assert_close(coefficient[:, None], f"{prefix}.diffusion.{form}")
    golden.assert_close(path.convert(v, x, t, "velocity", "score"), f"{prefix}.score_from_v")
    golden.assert_close(path.convert(v, x, t, "velocity", "noise"), f"{prefix}.noise_from_v")
    golden.assert_close(path.convert(s, x, t, "score", "velocity"), f"{prefix}.v_from_score")
    plan = path.plan(
        golden.tensor("in.path.t_plan"), golden.tensor("in.x1"), golden.tensor("in.x0")
    )
    golden.assert_close(plan.x, f"{prefix}.xt")
    golden.assert_close(plan.velocity, f"{prefix}.ut")


def _forward(golden: Golden, model: SiT) -> None:
    x1, t, y = golden.tensor("in.x1"), golden.tensor("in.loss.t"), golden.tensor("in.y")
    golden.assert_close(model(x1, t, y), "out.fwd")
    guided = forward_with_cfg(
        model, golden.tensor("in.cfg_x"), torch.cat([t, t]), golden.meta["cfg_scale"],
        y=golden.tensor("in.cfg_y"),
    )  # fmt: skip
    golden.assert_close(guided, "out.cfg")


def _loss(golden: Golden, model: SiT, key: str) -> None:
    _, _, path, prediction, weight = key.split(".")
    config = FlowMatching.Config(
        path=path.lower(),
        prediction=prediction,  # type: ignore[arg-type]
        # the official code ignores the weight of velocity losses; ours refuses it
        weight="none" if weight == "None" or prediction == "velocity" else weight,  # type: ignore[arg-type]
    )
    noise, t = golden.tensor("in.x0"), golden.tensor("in.loss.t")
    out = FlowMatching(config)(
        model, golden.tensor("in.x1"), noise=noise, t=t, y=golden.tensor("in.y")
    )
    golden.assert_close(out.per_sample, key)


def _velocity(model: SiT, run: Any) -> tuple[Any, Path]:
    path = get_path(run["path"].lower())
    return adapt(model, "sit", path=path, prediction=run["prediction"]), path


def _ode(golden: Golden, model: SiT, run: Any) -> None:
    velocity, _ = _velocity(model, run)
    # num_steps counts points
    grid = TimeGrid.uniform(run["num_steps"] - 1, run["t0"], run["t1"])
    start = golden.tensor("in.x1" if run["reverse"] else "in.x0")
    method = {"name": METHODS.get(run["method"], run["method"])}
    method |= {k: run[k] for k in ("rtol", "atol") if k in run}
    result = sample(
        velocity, start, sampler=method, grid=grid, trajectory=True, y=golden.tensor("in.y")
    )
    assert result.trajectory is not None
    golden.assert_close(result.trajectory[run["saved_indices"]], f"out.{run['tag']}")


def _sde(golden: Golden, model: SiT, run: Any) -> None:
    velocity, path = _velocity(model, run)
    last = (run["last_step"] or "None").lower()
    result = sample(
        velocity,
        golden.tensor("in.x0"),
        sampler={
            "name": METHODS[run["method"]],
            "path": path,
            "form": run["diffusion_form"].lower(),
            "norm": run["diffusion_norm"],
            "last_step": last,
            "last_step_size": run["last_step_size"],
        },
        grid=TimeGrid.uniform(run["num_steps"] - 1, run["t0"], run["t1"]),
        noise=golden.tensor("in.sde.noise"),
        trajectory=True,
        y=golden.tensor("in.y"),
    )
    assert result.trajectory is not None
    states = list(result.trajectory[1:])
    if last == "none":  # the official list repeats the last state
        states.append(states[-1])
    kept = [states[i] for i in (0, len(states) // 2, -2, -1)]
    golden.assert_close(torch.stack(kept), f"out.{run['tag']}")
