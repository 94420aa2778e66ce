"""Feature caching on a tiny FLUX: states of an Euler loop under every policy, and their decisions."""

from __future__ import annotations

from typing import Any

import torch
from effformer.models import Flux
from harness import Golden
from torch import Tensor
from torch.nn import functional as F

import effformer
from effformer.cache import Cached, cached, calibrate
from effformer.flow import Guidance, TimeGrid, adapt, sample
from effformer.nn.patch import unpatchify


def build(golden: Golden) -> Flux:
    c = golden.config
    golden.only("guidance_embeds", False, why="the set samples without a scale")
    golden.only("in_channels", 4, why="tokens are patches of 2 x 2 pixels of one channel")
    model = effformer.build_model(
        "flux-tiny",
        dim=c["heads"] * c["head_dim"],
        heads=c["heads"],
        depth=c["num_layers"] + c["num_single_layers"],
        doubles=c["num_layers"],
        channels=c["in_channels"] // 4,
        input_size=2 * c["tokens"][1],
        text_dim=c["joint_attention_dim"],
        pooled_dim=c["pooled_projection_dim"],
        guidance=False,
        rope={"widths": tuple(c["axes_dims_rope"])},
    )
    assert effformer.load_weights(model, golden.weights()).layout == "diffusers"
    assert isinstance(model, Flux)
    return model.eval()


class Loop:
    """The Euler loop of the set."""

    def __init__(self, golden: Golden) -> None:
        self.golden, self.model = golden, build(golden)
        self.steps = golden.config["steps"]
        rows, columns = golden.config["tokens"]
        self.x = unpatchify(golden.tensor("in.x"), rows, columns, 2, channels_first=True)
        self.cond = {"text": golden.tensor("in.context"), "pooled": golden.tensor("in.pooled")}

    def states(self, field: Any, guidance: Guidance | None = None) -> Tensor:
        """Tokens at all times (N + 1, B, L, C)."""
        grid = TimeGrid.uniform(self.steps)
        run = sample(field, self.x, grid=grid, trajectory=True, guidance=guidance, **self.cond)
        assert run.trajectory is not None
        return torch.stack([F.pixel_unshuffle(x, 2).flatten(2).mT for x in run.trajectory])

    def check(self, key: str, policy: Any, computed: Any = None) -> Cached:
        """States and decisions under a policy."""
        field = cached(adapt(self.model), policy)
        self.golden.assert_close(self.states(field), f"out.{key}")
        if computed is not None:
            shares = field.summary().computed
            assert [k for k, share in enumerate(shares) if share] == list(computed)
        return field


def check(golden: Golden) -> None:
    loop, c = Loop(golden), golden.config
    golden.assert_close(loop.states(adapt(loop.model)), "out.full")
    _check_first_block(golden, loop)
    for key, warm, order, until in (("i3_b2_o1", 2, 1, None), ("i3_b3_o2", 3, 2, 8)):
        policy = {
            "name": "forecast",
            "over": "attention",
            "every": 3,
            "warm": warm,
            "order": order,
            "until": until,
        }
        loop.check(f"taylorseer_{key}", policy, c[f"taylorseer_{key}"]["computed"])
    for order in range(3):
        loop.check(
            f"ours.stack_order{order}", {"name": "newton", "order": order, "every": 3, "warm": 3}
        )
    loop.check("pab", {"name": "pyramid", "every": 2, "interval": (0.15, 0.85)})
    _check_magcache(golden, loop)
    tea, easy = c["teacache"], c["easycache"]
    policy = {"name": "teacache", "poly": tea["coefficients"], "tau": tea["threshold"]}
    loop.check("ours.teacache", policy, tea["computed"])
    loop.check(
        "ours.easycache",
        {"name": "easycache", "tau": easy["threshold"], "warm": 3},
        easy["computed"],
    )


def _check_first_block(golden: Golden, loop: Loop) -> None:
    tau, computed = (
        golden.config["first_block"]["threshold"],
        golden.tensor("out.first_block.computed"),
    )
    policy = {"name": "residual", "tau": tau}
    loop.check("first_block", policy, computed.nonzero().flatten().tolist())
    null = Guidance(2.5, null={"text": golden.tensor("in.context_null")}, batched=False)
    states = loop.states(cached(adapt(loop.model), policy), null)
    golden.assert_close(states, "out.first_block_cfg")


def _check_magcache(golden: Golden, loop: Loop) -> None:
    plain = adapt(loop.model)
    policy = calibrate(plain, "magcache", loop.x, steps=loop.steps, **loop.cond)
    golden.assert_close(torch.tensor(policy.ratios), "out.magcache.ratios")
    c = golden.config["magcache"]
    loop.check("magcache", policy.replace(tau=c["threshold"], most=3, retention=0.2), c["computed"])
