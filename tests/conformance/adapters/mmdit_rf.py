"""SD3's recipe: laws of training times, shifted schedules, Euler and DPM-Solver++(2M), guidance."""

from __future__ import annotations

import re
from typing import Any

import torch
from harness import Golden
from torch import Tensor

from effformer.flow import CosMap, Guidance, LogitNormal, Mode, TimeGrid, Weak, adapt, sample


def check(golden: Golden) -> None:
    _laws(golden)
    for shift in golden.config["shifts"]:
        _schedules(golden, shift)
    _samplers(golden)


def _laws(golden: Golden) -> None:
    """The formulas are those of SD3, which counts the other way."""
    u, z = golden.tensor("in.u64"), golden.tensor("in.z64")
    for key in golden.keys("out.mode_s"):
        law = Mode(scale=float(re.findall(r"-?\d+\.\d+", key)[0]))
        golden.assert_close(law.density(u) if "_pdf_" in key else 1 - law.time(u), key)
    for mean, std in golden.config["lognorm"]:
        law, name = LogitNormal(mean=mean, std=std), f"out.lognorm_m{mean}_s{std}"
        golden.assert_close(law.time(z), f"{name}_t64")
        golden.assert_close(law.density(u.clamp(1e-3, 1 - 1e-3)), f"{name}_pdf_at_u64")
    t = CosMap().time(u)
    golden.assert_close(t, "out.cosmap_t64")
    golden.assert_close(CosMap().density(t), "out.cosmap_pdf_at_t64")


def _schedules(golden: Golden, shift: float) -> None:
    def shifted(sigmas: Tensor) -> Tensor:
        points = TimeGrid((*(1 - sigmas.double()).tolist(), 1.0)).shifted(shift).points
        return 1 - torch.tensor(points[:-1], dtype=torch.float64)

    golden.assert_close(shifted(golden.tensor("in.u64")), f"out.shift_{shift}_of_u64")
    every = torch.arange(1, 1001, 37, dtype=torch.float64) / 1000
    golden.assert_close(shifted(every), f"out.sd3_sigmas_shift{shift}")
    grid = TimeGrid.sd3(golden.config["steps"], shift)
    sigmas = 1 - torch.tensor(grid.points, dtype=torch.float64)
    golden.assert_close(sigmas, f"out.sd35_steps_sigmas_shift{shift}")
    golden.assert_close(sigmas, f"out.diffusers_sigmas_shift{shift}")


def _samplers(golden: Golden) -> None:
    a, b = golden.tensor("in.A"), golden.tensor("in.B")

    def network(
        x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, skip_layers: Any = ()
    ) -> Tensor:
        """The fake network that the set describes in words."""
        told = torch.einsum("ij,bnj->bi", b, text) * (t / 1000)[:, None] + 0.1 * pooled
        v = told[:, :, None, None].expand_as(x)
        return v if skip_layers else v + torch.einsum("ij,bjhw->bihw", a, x)

    field = adapt(network, "sd3")
    c, slg = golden.config, golden.config["slg"]
    grid = TimeGrid.sd3(c["steps"], c["shifts"][-1])
    cond = {"text": golden.tensor("in.ctx_cond"), "pooled": golden.tensor("in.y")}
    null: dict[str, Any] = {"text": golden.tensor("in.ctx_uncond"), "pooled": 0.0}
    x = golden.tensor("in.x_init")
    rule = Guidance(c["cfg"], null)
    whole = TimeGrid((grid.points[1], 1.0))  # one step from there ends at the expected data
    expected = sample(field, x, guidance=rule, grid=whole, **cond).x
    golden.assert_close(expected, "out.cfg_denoised_at_sigma1")
    for name, key in (("euler", "out.euler_final"), ("dpm++2m", "out.dpmpp2m_final")):
        out = sample(field, x, sampler=name, guidance=rule, grid=grid, **cond).x
        golden.assert_close(out, key)
    steps = range(c["steps"])
    inside = [i for i in steps if slg["start"] * len(steps) < i < slg["end"] * len(steps)]
    times = (grid.points[inside[0]], grid.points[inside[-1]])
    weak = Weak(slg["scale"], {"skip_layers": tuple(slg["layers"])}, interval=times)
    rule = Guidance(c["cfg"], null, weak=weak)
    golden.assert_close(sample(field, x, guidance=rule, grid=grid, **cond).x, "out.slg_euler_final")
