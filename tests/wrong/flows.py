"""Right calls of `effformer.flow`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import effformer
from effformer import flow

from .corpus import Entry


def field(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    return -x


def noisy(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([x, x], 1)


def x(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


def t(n: int = 3) -> Tensor:
    return torch.linspace(0.1, 0.9, n)


def step() -> Tensor:
    return torch.tensor([1, 5, 7])


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def process() -> flow.Diffusion:
    return flow.Diffusion.linear(50)


def labels() -> Tensor:
    return torch.tensor([0, 1, 2])


class Stretched(NamedTuple):
    z: Tensor
    log_det: Tensor


def doubled(x: Tensor) -> Stretched:
    """A normalizing flow."""
    return Stretched(2 * x, x.new_full((len(x),), 0.7 * math.prod(x.shape[1:])))


def tarflow() -> Any:
    return effformer.build_model("tarflow-tiny", input_size=4).eval()


PATHS = {p.name: p for p in (flow.Linear(), flow.GVP(), flow.VP(), flow.DDPM())}
LAWS = [
    flow.Uniform(),
    flow.Stratified(),
    flow.LogitNormal(),
    flow.UShaped(),
    flow.Fixed(),
    flow.KStep(),
]
LOSSES = [
    flow.FlowMatching(flow.FlowMatching.Config()),
    flow.PseudoHuber(flow.PseudoHuber.Config()),
    flow.Distillation(flow.Distillation.Config()),
]

ENTRIES: list[Entry] = []


def add(name: str, call: Any, *, skip: tuple[str, ...] = (), **good: Any) -> None:
    ENTRIES.append(Entry(name, call, lambda folder: {k: v() for k, v in good.items()}, skip))


SAMPLERS = ("euler", "heun", "dopri5", "sde-euler", "sde-heun")
for name in SAMPLERS:
    add(
        f"flow.sample {name}",
        flow.sample,
        velocity=lambda: field,
        x0=lambda: x(3, 4),
        sampler=lambda name=name: name,
        steps=lambda: 3,
        generator=rng,
        y=labels,
    )
add(
    "flow.sample",
    flow.sample,
    velocity=lambda: field,
    x0=lambda: x(3, 4),
    grid=lambda: flow.TimeGrid.uniform(2),
    reverse=lambda: True,
    guidance=lambda: flow.Guidance(2.0, {"y": 1}),
    trajectory=lambda: True,
    progress=lambda: lambda done, total: None,
    grad=lambda: True,
    y=labels,
)
add(
    "flow.sample noise",
    flow.sample,
    velocity=lambda: field,
    x0=lambda: x(3, 4),
    sampler=lambda: "sde-euler",
    steps=lambda: 2,
    noise=lambda: [x(3, 4), x(3, 4)],
)
add(
    "flow.sample dict",
    flow.sample,
    velocity=lambda: field,
    x0=lambda: x(3, 4),
    sampler=lambda: {"name": "dopri5", "rtol": 1e-3},
)
add(
    "flow.adapt",
    flow.adapt,
    network=lambda: field,
    convention=lambda: "sd3",
    path=lambda: "gvp",
    prediction=lambda: "noise",
)
add(
    "flow.adapt()",
    lambda x, t, **cond: flow.adapt(field, "sd3")(x, t, **cond),
    x=lambda: x(3, 4),
    t=t,
    y=labels,
)
add("flow.flip", flow.flip, velocity=lambda: field)
add(
    "flow.flip()",
    lambda x, t, **cond: flow.flip(field)(x, t, **cond),
    x=lambda: x(3, 4),
    t=t,
    y=labels,
)
add("flow.get_convention", flow.get_convention, convention=lambda: "sd3")
add("flow.trained_of", flow.trained_of, network=lambda: field)
for one in ("time", "label"):
    add(f"flow.FlowConvention.{one}", getattr(flow.get_convention("rfpp"), one), t=t)
add("flow.FlowConvention.velocity", flow.get_convention("triposg").velocity, v=lambda: x(3, 4))
add(
    "flow.FlowConvention.from_dict",
    flow.FlowConvention.from_dict,
    data=lambda: {"name": "sd3"},
    where=lambda: "here",
)
add(
    "flow.FlowConvention",
    flow.FlowConvention,
    data_at=lambda: 1,
    label_scale=lambda: 2.0,
    path=lambda: flow.Linear(),
    prediction=lambda: "noise",
)
add(
    "flow.Trained",
    flow.Trained,
    convention=lambda: "sd3",
    null=lambda: True,
    steps=lambda: 2,
    value_range=lambda: (0.0, 1.0),
    latent_scale=lambda: 2.0,
)
add(
    "flow.Trained.settings",
    flow.Trained(convention="sd3").settings,
    steps=lambda: 3,
    guidance=lambda: 2.0,
)
add(
    "flow.guided",
    flow.guided,
    velocity=lambda: field,
    scale=lambda: 2.0,
    null=lambda: {"y": 1},
    channels=lambda: 2,
    interval=lambda: (0.2, 0.8),
    batched=lambda: False,
)
add(
    "flow.guided()",
    lambda x, t, **cond: flow.guided(field, 2.0, null={"y": 1}, interval=(0, 1))(x, t, **cond),
    x=lambda: x(3, 4),
    t=t,
    y=labels,
)
add(
    "flow.Guidance",
    flow.Guidance,
    scale=lambda: 2.0,
    null=lambda: {"y": 1},
    interval=lambda: (0.2, 0.8),
)
add(
    "flow.Guided",
    flow.Guided,
    velocity=lambda: field,
    guidance=lambda: flow.Guidance(2.0, {"y": 1}),
)
add(
    "flow.forward_with_cfg",
    flow.forward_with_cfg,
    network=lambda: field,
    x=lambda: x(4, 4),
    t=lambda: t(4),
    scale=lambda: 2.0,
    channels=lambda: 3,
    interval=lambda: (0.0, 0.5),
    y=lambda: torch.arange(4),
)
for loss in LOSSES:
    add(
        f"flow.{type(loss).__name__}()",
        loss,
        network=lambda: field,
        data=lambda: x(3, 4),
        noise=lambda: x(3, 4),
        t=t,
        generator=rng,
        y=labels,
    )
add("flow.FlowMatching", flow.FlowMatching, config=lambda: flow.FlowMatching.Config())
add(
    "flow.FlowMatching.Config",
    flow.FlowMatching.Config,
    path=lambda: "gvp",
    prediction=lambda: "noise",
    weight=lambda: "none",
    time=lambda: "uniform",
    reduction=lambda: "mean",
    cosine=lambda: 1.0,
)
add("flow.PseudoHuber", flow.PseudoHuber, config=lambda: flow.PseudoHuber.Config())
add(
    "flow.Distillation",
    flow.Distillation,
    config=lambda: flow.Distillation.Config(perceptual=1.0),
    perceptual=lambda: lambda a, b: a[:, 0],
)
add(
    "flow.Distillation() perceptual",
    flow.Distillation(flow.Distillation.Config(perceptual=1.0), lambda a, b: (a - b)[:, 0]),
    network=lambda: field,
    data=lambda: x(3, 4),
    noise=lambda: x(3, 4),
)
add("flow.cosine_distance", flow.cosine_distance, value=lambda: x(3, 4), target=lambda: x(3, 4))
add(
    "flow.loss_weight", flow.loss_weight, path=lambda: flow.Linear(), t=t, weight=lambda: "velocity"
)
add(
    "flow.frechet_distance", flow.frechet_distance, features=lambda: x(5, 3), others=lambda: x(4, 3)
)
add(
    "flow.straightness",
    flow.straightness,
    trajectory=lambda: x(3, 2, 4),
    times=lambda: [0.0, 0.4, 1.0],
    reduce=lambda: "mean",
    per_sample=lambda: True,
)
for name, path in PATHS.items():
    for method in ("alpha", "sigma", "dalpha", "dsigma", "ratio", "gain"):
        add(f"flow.{name}.{method}", getattr(path, method), t=t)
    add(f"flow.{name}.plan", path.plan, t=t, x1=lambda: x(3, 4), x0=lambda: x(3, 4))
    add(
        f"flow.{name}.ends",
        path.ends,
        value=lambda: x(3, 4),
        x=lambda: x(3, 4),
        t=t,
        kind=lambda: "noise",
    )
    add(
        f"flow.{name}.convert",
        path.convert,
        value=lambda: x(3, 4),
        x=lambda: x(3, 4),
        t=t,
        source=lambda: "noise",
        target=lambda: "data",
    )
add("flow.Path.from_dict", flow.Path.from_dict, data=lambda: {"name": "vp", "beta0": 0.2})
add("flow.Linear", flow.Linear, sigma_min=lambda: 0.1)
add("flow.VP", flow.VP, beta0=lambda: 0.1, beta1=lambda: 10.0)
add(
    "flow.DDPM",
    flow.DDPM,
    steps=lambda: 100,
    beta_start=lambda: 1e-4,
    beta_end=lambda: 0.02,
    schedule=lambda: "linear",
)
add("flow.get_path", flow.get_path, path=lambda: "gvp")
add(
    "flow.time_interval",
    flow.time_interval,
    path=lambda: "gvp",
    prediction=lambda: "noise",
    stochastic=lambda: True,
    sbdm=lambda: True,
    last_step=lambda: 0.04,
    train=lambda: True,
)
add(
    "flow.diffusion_coefficient",
    flow.diffusion_coefficient,
    path=lambda: flow.Linear(),
    t=t,
    form=lambda: "sigma",
    norm=lambda: 1.0,
)
for law in LAWS:
    add(
        f"flow.{type(law).__name__}.sample",
        law.sample,
        n=lambda: 3,
        generator=rng,
        device=lambda: "cpu",
    )
add("flow.UShaped", flow.UShaped, a=lambda: 2.0, low=lambda: 0.1, high=lambda: 0.9)
add("flow.UShaped.density", flow.UShaped().density, u=t)
add("flow.Stratified", flow.Stratified, strata=lambda: 4, low=lambda: 0.1, high=lambda: 0.9)
add("flow.Uniform", flow.Uniform, low=lambda: 0.1, high=lambda: 0.9)
add("flow.KStep", flow.KStep, k=lambda: 4, eps=lambda: 0.1)
add("flow.LogitNormal", flow.LogitNormal, mean=lambda: 0.0, std=lambda: 1.0)
add("flow.Fixed", flow.Fixed, t=lambda: 0.1)
add("flow.TimeLaw.from_dict", flow.TimeLaw.from_dict, data=lambda: {"name": "fixed", "t": 0.5})
add("flow.get_time_law", flow.get_time_law, law=lambda: "uniform")
add("flow.TimeGrid", flow.TimeGrid, points=lambda: (0.0, 0.5, 1.0), widths=lambda: (0.5, 0.5))
add(
    "flow.TimeGrid.uniform",
    flow.TimeGrid.uniform,
    steps=lambda: 3,
    start=lambda: 0.0,
    end=lambda: 1.0,
)
add("flow.TimeGrid.rectified_flow", flow.TimeGrid.rectified_flow, steps=lambda: 3, eps=lambda: 1e-3)
add("flow.space_timesteps", flow.space_timesteps, steps=lambda: 50, sections=lambda: "ddim10")
add("flow.space_timesteps list", flow.space_timesteps, steps=lambda: 50, sections=lambda: [3, 4])
add(
    "flow.Diffusion",
    flow.Diffusion,
    betas=lambda: torch.full((4,), 0.1),
    timesteps=lambda: [0, 1, 2, 3],
    variance=lambda: "fixed-small",
)
add(
    "flow.Diffusion.linear",
    flow.Diffusion.linear,
    steps=lambda: 50,
    respacing=lambda: "4",
    variance=lambda: "fixed-large",
)
add(
    "flow.Diffusion.from_path",
    flow.Diffusion.from_path,
    path=lambda: flow.DDPM(steps=50),
    variance=lambda: "fixed-small",
)
add("flow.Diffusion.respace", process().respace, keep=lambda: [0, 3, 7])
add(
    "flow.Diffusion.q_sample",
    process().q_sample,
    x0=lambda: x(3, 2),
    step=step,
    noise=lambda: x(3, 2),
)
add(
    "flow.Diffusion.p_mean_variance",
    process().p_mean_variance,
    network=lambda: noisy,
    x=lambda: x(3, 2),
    step=step,
    clip=lambda: True,
)
add(
    "flow.Diffusion.training_losses",
    process().training_losses,
    network=lambda: noisy,
    x0=lambda: x(3, 2),
    step=step,
    noise=lambda: x(3, 2),
)
add(
    "flow.Diffusion.ddim_step",
    process().ddim_step,
    network=lambda: noisy,
    x=lambda: x(3, 2),
    step=step,
    eta=lambda: 0.5,
    noise=lambda: x(3, 2),
    clip=lambda: True,
)
add(
    "flow.Diffusion.ancestral_step",
    process().ancestral_step,
    network=lambda: noisy,
    x=lambda: x(3, 2),
    step=step,
    noise=lambda: x(3, 2),
    clip=lambda: True,
)
add(
    "flow.Diffusion.sample",
    process().sample,
    network=lambda: noisy,
    x=lambda: x(3, 2),
    method=lambda: "ddim",
    eta=lambda: 0.5,
    generator=rng,
    clip=lambda: True,
    progress=lambda: lambda a, b: None,
)
add("flow.Likelihood", flow.Likelihood, config=lambda: flow.Likelihood.Config())
add("flow.Likelihood.Config", flow.Likelihood.Config, noise=lambda: 0.0, levels=lambda: 256)
add(
    "flow.Likelihood call",
    flow.Likelihood(flow.Likelihood.Config()),
    network=lambda: doubled,
    data=lambda: x(3, 2),
    generator=rng,
)
add("flow.log_likelihood", flow.log_likelihood, model=lambda: doubled, x=lambda: x(3, 2))
add(
    "flow.bits_per_dim",
    flow.bits_per_dim,
    model=lambda: doubled,
    x=lambda: x(3, 2),
    levels=lambda: 16,
    value_range=lambda: (-1.0, 1.0),
)
add(
    "flow.denoised",
    flow.denoised,
    model=lambda: doubled,
    x=lambda: x(3, 2),
    noise=lambda: 0.1,
    strength=lambda: 1.2,
)
add(
    "flow.Inversion",
    flow.Inversion,
    segment=lambda: 4,
    iterations=lambda: 3,
    tolerance=lambda: 1e-3,
    measure=lambda: "relative",
    start=lambda: "zeros",
    bound=lambda: 3.0,
)
add(
    "flow.Away",
    flow.Away,
    scale=lambda: 1.5,
    weak=lambda: {"y": None},
    rule=lambda: "gaussian",
    moves=lambda: "both",
    rising=lambda: True,
)
add(
    "flow.invert",
    flow.invert,
    model=tarflow,
    z=lambda: x(3, 3, 4, 4),
    inversion=lambda: [flow.Inversion(), flow.Inversion(segment=None), flow.Inversion()],
    guidance=lambda: flow.Away(scale=1.0, weak={"y": None}),
    y=labels,
)
add("flow.contractions", flow.contractions, model=tarflow, x=lambda: x(3, 3, 4, 4))
add(
    "flow.inversion_plan",
    flow.inversion_plan,
    found=lambda: [flow.Contraction(1.0, 2.0, 3.0)],
    tough=lambda: 1,
    segment=lambda: 8,
    iterations=lambda: 4,
    elsewhere=lambda: 3,
    tolerance=lambda: 1e-4,
)
