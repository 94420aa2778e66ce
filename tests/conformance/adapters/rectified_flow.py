"""Rectified flow: losses and gradients, Euler and RK45 sampling, reflow and distillation,
straightness, EMA.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from harness import Golden
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.flow import (
    Distillation,
    Fixed,
    FlowConvention,
    FlowMatching,
    TimeGrid,
    Velocity,
    adapt,
    sample,
    straightness,
)
from effformer.train.ema import EMA


class TinyVel(nn.Module):
    """The reference network that the set describes in words."""

    freqs: Tensor

    def __init__(self, channels: int, hidden: int, freqs: Tensor) -> None:
        super().__init__()
        self.register_buffer("freqs", freqs)
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.conv3 = nn.Conv2d(hidden, channels, 3, padding=1)
        self.lin = nn.Linear(2 * len(freqs), hidden)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        angle = label[:, None] * self.freqs
        h = self.conv1(x) + self.lin(torch.cat([angle.sin(), angle.cos()], 1))[:, :, None, None]
        h = F.silu(h)
        return self.conv3(h + F.silu(self.conv2(h)))


def check(golden: Golden) -> None:
    config = golden.config
    weights = golden.weights()
    network = TinyVel(config["C"], config["hidden"], weights["freqs"])
    network.load_state_dict(weights)
    convention = FlowConvention(data_at=1, label_scale=float(config["time_label_scale"]))
    velocity = adapt(network, convention)
    _first_flow(golden, network, velocity)
    _euler(golden, velocity, config)
    _adaptive(golden, velocity, config)
    _stochastic(golden, velocity, config)
    _straightness(golden, config)
    _reflow(golden, velocity, config)
    _ema(golden)


def _first_flow(golden: Golden, network: nn.Module, velocity: Velocity) -> None:
    data, noise, t = (golden.tensor(f"in.{k}") for k in ("data", "rf1.z0", "rf1.t"))
    out = FlowMatching(FlowMatching.Config())(velocity, data, noise=noise, t=t)
    golden.assert_close(out.loss, "out.rf1.loss_mean")
    golden.assert_close(out.x, "out.rf1.xt")
    golden.assert_close(out.prediction, "out.rf1.v")
    out.loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        golden.assert_close(parameter.grad, f"grad.rf1.loss_mean.{name}")
    half = FlowMatching(FlowMatching.Config(reduction="half-sum"))(velocity, data, noise=noise, t=t)
    golden.assert_close(half.loss, "out.rf1.loss_half_sum")


def _euler(golden: Golden, velocity: Velocity, config: Any) -> None:
    z0 = golden.tensor("in.z0")
    for n in config["euler_N"]:
        grid = TimeGrid.rectified_flow(n, config["eps"])
        result = sample(velocity, z0, grid=grid, trajectory=True)
        golden.assert_close(result.x, f"out.euler{n}")
        if f"out.euler{n}_traj" in golden.tensors:
            assert result.trajectory is not None
            golden.assert_close(result.trajectory, f"out.euler{n}_traj")
    for key in golden.keys("out.reflow.z1_euler"):
        n = int(re.findall(r"euler(\d+)", key)[0])
        golden.assert_close(
            sample(velocity, z0, grid=TimeGrid.rectified_flow(n, config["eps"])).x, key
        )


def _adaptive(golden: Golden, velocity: Velocity, config: Any) -> None:
    z0 = golden.tensor("in.z0")
    grid = TimeGrid((config["eps"], 1.0))
    solver = {"name": "dopri5", "rtol": config["ode_rtol"], "atol": config["ode_atol"]}
    forth = sample(velocity, z0, sampler=solver, grid=grid)
    golden.assert_close(forth.x, "out.reflow.z1_rk45", atol=1e-4)
    golden.assert_close((forth.x + 1) / 2, "out.rk45_unscaled01", atol=1e-4)
    assert abs(forth.nfe - int(golden.tensor("out.rk45_nfe"))) <= 12
    z1 = golden.tensor("out.reflow.z1_rk45")
    back = sample(velocity, z1, sampler=solver, grid=grid, reverse=True)
    golden.assert_close(back.x, "out.reflow.z0_back_rk45", atol=1e-4)
    for key in golden.keys("out.rk45_tol"):
        if key.endswith("_nfe"):
            continue
        tolerance = float(key.removeprefix("out.rk45_tol"))
        loose = sample(
            velocity, z0, grid=grid, sampler={"name": "rk45", "rtol": tolerance, "atol": tolerance}
        )
        golden.assert_close(loose.x, key, atol=1e-4)
        assert abs(loose.nfe - int(golden.tensor(f"{key}_nfe"))) <= 12


def _stochastic(golden: Golden, velocity: Velocity, config: Any) -> None:
    for key in golden.keys("out.sde_repo_formula"):
        steps, sigma = re.fullmatch(r".*_N(\d+)_sigma([\d.e-]+)", key).groups()  # type: ignore[union-attr]
        result = sample(
            velocity,
            golden.tensor("in.z0"),
            sampler={
                "name": "stochastic-euler",
                "sigma": float(sigma),
                "repo_formula": True,
                "noise_scale": config["noise_scale"],
            },
            grid=TimeGrid.rectified_flow(int(steps), config["eps"]),
            noise=golden.tensor("in.sde.noise"),
        )
        golden.assert_close(result.x, key)


def _straightness(golden: Golden, config: Any) -> None:
    path = golden.tensor(f"out.euler{max(config['euler_N'])}_traj")
    golden.assert_close(straightness(path, reduce="mean"), "out.straightness_mean_over_dims")
    golden.assert_close(
        straightness(path, reduce="mean", per_sample=True),
        "out.straightness_per_sample_mean_over_dims",
    )
    golden.assert_close(straightness(path), "out.straightness_paper_sum_over_dims")


def _reflow(golden: Golden, velocity: Velocity, config: Any) -> None:
    eps = config["eps"]
    noise, data = golden.tensor("in.z0"), golden.tensor("out.reflow.z1_rk45")

    def loss(time: Any = "uniform", t: Tensor | None = None) -> Tensor:
        objective = FlowMatching(FlowMatching.Config(time=time))
        return objective(velocity, data, noise=noise, t=t).loss

    golden.assert_close(loss(t=golden.tensor("in.reflow.uniform.t")), "out.reflow.loss_uniform_l2")
    golden.assert_close(loss(Fixed(t=eps)), "out.reflow.loss_t0_l2")
    golden.assert_close(loss(Fixed(t=1 - eps + eps)), "out.reflow.loss_t1_l2")
    golden.assert_close(loss(t=golden.tensor("in.reflow.kstep.t")), "out.reflow.loss_kstep_l2")

    kernel, bias = golden.tensor("perc.conv.weight"), golden.tensor("perc.conv.bias")

    def perceptual(a: Tensor, b: Tensor) -> Tensor:
        features = [F.conv2d(image, kernel, bias, padding=1) for image in (a, b)]
        return (features[0] - features[1]).square().flatten(1).mean(1)

    for key, l2 in (("lpips", 0.0), ("lpips+l2", 1.0)):
        options = Distillation.Config(time=Fixed(t=eps), l2=l2, perceptual=1.0)
        out = Distillation(options, perceptual)(velocity, data, noise=noise)
        golden.assert_close(out.loss, f"out.reflow.loss_t0_{key}")


def _ema(golden: Golden) -> None:
    words = golden.meta["tensors"]["in.ema.params/out.ema.shadow"]
    found = re.search(r"decay ([\d.]*\d)", words)
    assert found is not None
    weights = golden.tensor("in.ema.params")
    ema = EMA([weights[0]], decay=float(found[1]))
    shadows = [ema.shadow["0"].clone()]
    for step in weights[1:]:
        ema.update([step])
        shadows.append(ema.shadow["0"].clone())
    golden.assert_close(torch.stack(shadows), "out.ema.shadow")
