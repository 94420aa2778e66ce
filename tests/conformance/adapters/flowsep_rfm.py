"""FlowSep's objective and sampler: the loss with its gradients on a network that also sees the mixture and
whose further outputs count nothing, and Euler steps.
"""

from __future__ import annotations

import torch
from harness import Golden
from torch import Tensor
from torch.nn import functional as F

from effformer.flow import FlowMatching, Linear, adapt, get_convention, sample


class Network:
    """The network that the set describes in words."""

    def __init__(self, weights: dict[str, Tensor], channels: int) -> None:
        self.weights, self.channels = weights, channels

    def __call__(
        self, x: Tensor, t: Tensor, *, mixture: Tensor, text: Tensor, text_mask: Tensor
    ) -> Tensor:
        w = self.weights
        kept = text_mask[..., None]
        c = (text * kept).sum(1) / kept.sum(1)
        h = F.conv2d(torch.cat([x, mixture], 1), w["w1"], w["b1"], padding=1)
        h = torch.tanh(h + (t[:, None] * w["tw"] + c @ w["cw"])[..., None, None])
        h = torch.tanh(F.conv2d(h, w["w2"], w["b2"], padding=1))
        return F.conv2d(h, w["w3"], w["b3"], padding=1)[:, : self.channels]


def check(golden: Golden) -> None:
    c = golden.config
    convention = get_convention("flowsep")
    assert convention.path == Linear(sigma_min=c["sigma_min"])
    weights = {name: value.requires_grad_() for name, value in golden.weights().items()}
    velocity = adapt(Network(weights, c["C"]), convention)
    cond = {
        name: golden.tensor(f"in.{key}")
        for name, key in (("mixture", "z_mixture"), ("text", "text"), ("text_mask", "text_mask"))
    }
    objective = FlowMatching(FlowMatching.Config(path=convention.path))
    out = objective(
        velocity, golden.tensor("in.z_target"), noise=golden.tensor("in.noise"),
        t=golden.tensor("in.t"), **cond,
    )  # fmt: skip
    golden.assert_close(out.loss, "out.loss")
    out.loss.backward()
    for key in golden.keys("grad."):
        golden.assert_close(weights[key.removeprefix("grad.")].grad, key)
    with torch.no_grad():
        found = sample(velocity, golden.tensor("in.sample_noise"), steps=c["steps"], **cond).x
    golden.assert_close(found, "out.sample")
