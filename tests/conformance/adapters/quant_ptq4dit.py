"""PTQ4DiT: saliences, their weights over time, and the balanced layer."""

from __future__ import annotations

import torch
from effformer.compress.quant import smooth
from effformer.compress.quant.calibrate import TIMES, Seen
from harness import Golden
from torch.nn import functional as F


def check(golden: Golden) -> None:
    x, w = golden.tensor("in.x"), golden.weights()
    samples = golden.config["samples"]
    golden.only("samples", *range(1, TIMES + 1), why="a part of the time axis for every sample")
    weight = w["fc1.weight"]
    seen = Seen(x.shape[-1], ["times"])
    # every sample of the official code is a time of its own
    seen.add(x, (torch.arange(samples) + 0.5) / TIMES)
    salience = seen.saliences()
    golden.assert_close(salience, "out.salience")
    columns = weight.abs().amax(0)
    tau = torch.stack([smooth.spearman(one, columns) for one in salience])
    golden.assert_close(tau, "out.tau", rtol=1e-5)
    golden.assert_close(smooth.time_weights(salience, columns), "out.weight_t", rtol=1e-5)
    scale = smooth.PTQ4DiT(smooth.PTQ4DiT.Config()).scale(weight, seen)
    golden.assert_close(scale, "out.scale", rtol=1e-5)
    golden.assert_close(weight * scale, "out.fc1_weight", rtol=1e-5)
    hidden = F.gelu(F.linear(x / scale, weight * scale, w["fc1.bias"]), approximate="tanh")
    golden.assert_close(F.linear(hidden, w["fc2.weight"], w["fc2.bias"]), "out.y")
