"""DyDiT: evaluation masked and skipping, complete, training with recorded noise, loss, guidance."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch
from effformer.compress.dynamic.work import executed_ratio, work_loss
from effformer.models.dydit import DyDiT
from harness import Golden
from torch import Tensor

import effformer
from effformer.context import Ledger, Tap
from effformer.flow.guidance import forward_with_cfg
from effformer.ledger import Share

OFFICIAL_GATES = {"attn": "width.attn", "mlp": "width.ffn", "token": "tokens.ffn"}


def check(golden: Golden) -> None:
    model = build(golden)
    times = [m[1] for key in golden.tensors if (m := re.fullmatch(r"out\.eval\.t([\d.]+)", key))]
    assert times
    with torch.no_grad():
        for time in times:
            _check_eval(golden, model, time)
        if "out.cfg" in golden.tensors:
            _check_guidance(golden, model)
    if "in.train.t" in golden.tensors:
        _check_training(golden, model)


def build(golden: Golden) -> DyDiT:
    c = golden.config
    gate = {"tau": float(golden.meta["tau"]), "threshold": float(golden.meta["threshold"])}
    gate = {k: float(c.get(k, v)) for k, v in gate.items()}
    model = effformer.build_model(
        "dydit-nano",
        input_size=c["input_size"],
        patch=c["patch_size"],
        channels=c["in_channels"],
        dim=c["hidden_size"],
        depth=c["depth"],
        heads=c["num_heads"],
        ffn={"ratio": float(c.get("mlp_ratio", 4.0))},
        num_classes=c["num_classes"],
        learn_sigma=c["learn_sigma"],
        label_dropout=c.get("class_dropout_prob", 0.1),
        width=gate,
        tokens=gate,
    )
    assert effformer.load_weights(model, golden.weights()).layout == "official"
    assert isinstance(model, DyDiT)
    return model.eval()


def _check_eval(golden: Golden, model: DyDiT, time: str) -> None:
    x, y = golden.tensor("in.x"), golden.tensor("in.y")
    t, prefix = torch.full((len(x),), float(time)), f"out.eval.t{time}"
    gates = Tap(keep=("blocks.*.width.*", "blocks.*.tokens.*"))  # a tap sees the masked execution
    golden.assert_close(model(x, t, y, tap=gates), prefix)
    _check_gates(golden, gates, prefix, model.config.depth)
    ledger = Ledger()
    skipped = model(x, t, y, ledger=ledger)
    golden.assert_close(skipped, prefix)
    if f"{prefix}.skip" in golden.tensors:
        golden.assert_close(skipped, f"{prefix}.skip")
    golden.assert_close(executed_ratio(_shares(golden, ledger)).mean(), f"{prefix}.flops_ratio")
    if f"{prefix}.complete" in golden.tensors:
        golden.assert_close(model(x, t, y, complete=True), f"{prefix}.complete")


def _check_gates(golden: Golden, tap: Tap, prefix: str, depth: int) -> None:
    for official, place in OFFICIAL_GATES.items():
        values = [tap.seen[f"blocks.{i}.{place}"] for i in range(depth)]
        if official != "token":  # the unit that is always on has no gate
            values = [torch.nn.functional.pad(v, (1, 0), value=1.0) for v in values]
        golden.assert_close(torch.stack(values, dim=1), f"{prefix}.{official}_mask")


def _check_training(golden: Golden, model: DyDiT) -> None:
    x, y, t = golden.tensor("in.x"), golden.tensor("in.y"), golden.tensor("in.train.t")
    model.train()
    if "out.train.complete" in golden.tensors:
        golden.assert_close(model(x, t, y, complete=True), "out.train.complete")
    noise = _recorded_noise(golden, model.config.depth)
    places = ("blocks.*.width.*", "blocks.*.tokens.*")
    tap = Tap(keep=places, edit=lambda place, _: noise[place], at=tuple(noise))
    ledger = Ledger()
    out = model(x, t, y, tap=tap, ledger=ledger)
    golden.assert_close(out, "out.train.y")
    _check_gates(golden, tap, "out.train", model.config.depth)
    shares = _shares(golden, ledger)
    golden.assert_close(executed_ratio(shares).mean(), "out.train.flops_ratio")
    loss = golden.meta["token_loss_ratio"] * work_loss(shares, golden.meta["lambda_target"])
    golden.assert_close(loss, "out.train.flops_loss")
    total = (out * golden.tensor("in.train.loss_weight")).mean() + loss
    golden.assert_close(total, "out.train.total")
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    official = model.LAYOUTS[0].from_ours(grads, model.config)
    keys = golden.keys("grad.")
    assert keys
    for key in keys:
        golden.assert_close(official[key.removeprefix("grad.")], key)
    model.eval()


def _recorded_noise(golden: Golden, depth: int) -> dict[str, Tensor]:
    """Gumbel noise g1 - g2 from exponential draws, by place."""
    return {
        f"blocks.{i}.{place}.noise": golden.tensor(f"in.train.exp.block{i}.{official}.2").log()
        - golden.tensor(f"in.train.exp.block{i}.{official}.1").log()
        for i in range(depth)
        for official, place in OFFICIAL_GATES.items()
    }


def _shares(golden: Golden, ledger: Ledger) -> dict[str, Share]:
    """What the parts executed, at the official code's constants for the cost of a part.

    Those of a size of the paper are the exact multiply-adds of its parts; the set applies them to a
    smaller model.
    """
    constants = golden.meta["flops_constants"]
    costs = {"attn": constants["attn"], "ffn": constants["mlp"]}
    name = re.fullmatch(r"DiT-(\w+)/(\d+)", constants["name"])
    if name is not None:
        with torch.device("meta"):
            block = effformer.build_model(constants["name"], depth=1).blocks[0]
        for part, cost in costs.items():
            exact = getattr(block, part).part.macs((32 // int(name[2])) ** 2)
            assert math.isclose(exact / 1e9, cost, rel_tol=1e-9)
    return {
        path: replace(share, cost=costs[path.rpartition(".")[2]])
        for path, share in ledger.shares.items()
    }


def _check_guidance(golden: Golden, model: DyDiT) -> None:
    x, y = golden.tensor("in.x"), golden.tensor("in.y")
    t = torch.full((2 * len(x),), float(golden.meta["timesteps"][1]))
    labels = torch.cat([y, torch.full_like(y, model.config.num_classes)])
    scale = golden.meta["cfg_scale"]
    guided = forward_with_cfg(model, torch.cat([x, x]), t, scale, y=labels)
    golden.assert_close(guided, "out.cfg")
