"""DiT-DH: blocks of both widths, velocity, training loss, shifted times, guidance, samples, gradients."""

from __future__ import annotations

import math

import torch
from effformer.models import DiTDH
from harness import Golden

import effformer
from effformer.flow import FlowMatching, TimeGrid, adapt, guided, sample


def check(golden: Golden) -> None:
    model = build(golden)
    x = golden.tensor("in.x").clone().requires_grad_()
    t, y = golden.tensor("in.t"), golden.tensor("in.y")
    left: dict[int, torch.Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, args, out, i=i: left.__setitem__(i, out))
    v = model(x, t, y)
    for i, made in left.items():
        golden.assert_close(made, f"out.block{i}")
    golden.assert_close(v, "out.v")
    v.square().mean().backward()
    assert x.grad is not None
    golden.assert_close(x.grad, "grad.x")
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    official = model.LAYOUTS[0].from_ours(grads, model.config)
    for key in golden.keys("grad."):
        if key != "grad.x":
            golden.assert_close(official[key.removeprefix("grad.")], key)
    with torch.no_grad():
        _check_flow(golden, model)
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    assert saved.keys() == golden.weights().keys()
    for key in golden.weights():
        golden.assert_close(saved[key], f"w.{key}")


def _check_flow(golden: Golden, model: DiTDH) -> None:
    c = golden.config
    data, noise, y = (golden.tensor(f"in.{k}") for k in ("data", "noise", "y"))
    shift = math.sqrt(data[0].numel() / 4096)
    golden.assert_close(torch.tensor([shift]), "out.time_dist_shift")
    u = golden.tensor("in.u_train")
    t = torch.tensor([TimeGrid((1 - float(one), 1.0)).shifted(shift).start for one in u])
    golden.assert_close(t, "out.t_train")
    out = FlowMatching(FlowMatching.Config())(
        adapt(model), data, noise=noise, t=golden.tensor("out.t_train"), y=y
    )
    golden.assert_close(out.per_sample, "out.train_loss")
    times = TimeGrid.uniform(c["sampling_steps"] - 1).shifted(shift)
    golden.assert_close(torch.tensor(times.points), "out.ode_times")
    golden.assert_close(sample(adapt(model), noise, grid=times, y=y).x, "out.euler_samples")
    x, t = golden.tensor("in.x"), golden.tensor("in.t")
    field = guided(
        adapt(model),
        c["cfg_scale"],
        null={"y": c["num_classes"]},
        interval=tuple(c["cfg_interval"]),
    )
    golden.assert_close(torch.cat([field(x, t, y=y)] * 2), "out.v_cfg")


def build(golden: Golden) -> DiTDH:
    c = golden.config
    golden.only("use_rmsnorm", True, why="it is what DiT-DH has")
    golden.only("use_rope", True, why="it is what DiT-DH has")
    model = effformer.build_model(
        "ditdh-nano",
        dim=c["hidden"][0],
        wide_dim=c["hidden"][1],
        heads=c["heads"][0],
        wide_heads=c["heads"][1],
        depth=sum(c["depth"]),
        wide_depth=c["depth"][1],
        input_size=c["grid"],
        channels=c["token_channels"],
        num_classes=c["num_classes"],
        label_dropout=c["label_dropout"],
        attn={"qk_norm": c["qk_norm"]},
        ffn={"ratio": c["mlp_ratio"] * 2 / 3},
    )
    assert isinstance(model, DiTDH)
    assert effformer.load_weights(model, golden.weights()).layout == "official"
    return model.eval()
