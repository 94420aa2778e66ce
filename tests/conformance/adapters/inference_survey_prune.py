"""Scores and masks of pruning: heads, neurons, weights, tiles; and the widths of DynaBERT."""

from __future__ import annotations

from typing import Any

import torch
from effformer.compress import importance
from effformer.compress.prune.masks import (
    Movement,
    block_scores,
    magnitude_mask,
    n_of_m_mask,
    sparsify,
    wanda_scores,
)
from effformer.compress.prune.statistics import observed
from effformer.compress.prune.widths import dyna_layers, dyna_widths
from harness import Golden
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.attention import Attention
from effformer.ffn import MLP
from effformer.site import Site


class Toy(nn.Module):
    """Attention and FFN around a residual stream, no norms, mean of the tokens, classes."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        site = Site(dim=c["d"], heads=c["heads"])
        self.attn = Attention(Attention.Config(qkv_bias=False, proj_bias=False), site)
        self.ffn = MLP(MLP.Config(hidden=c["ff"], act="gelu"), site)
        self.head = nn.Linear(c["d"], c["classes"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return self.head((x + self.ffn(x)).mean(dim=1))


def check(golden: Golden) -> None:
    toy = Toy(golden.config).eval()
    w = golden.weights()
    with torch.no_grad():
        toy.attn.qkv.weight.copy_(torch.cat([w["wq"], w["wk"], w["wv"]]))
        for parameter, name in (
            (toy.attn.proj.weight, "wo"), (toy.ffn.fc1.weight, "w1"), (toy.ffn.fc1.bias, "b1"),
            (toy.ffn.fc2.weight, "w2"), (toy.head.weight, "cls"),
        ):  # fmt: skip
            parameter.copy_(w[name])
        toy.ffn.fc2.bias.zero_()
    batches = [
        {"x": x, "y": y} for x, y in zip(golden.tensor("in.X"), golden.tensor("in.Y"), strict=True)
    ]
    for i, batch in enumerate(batches):
        golden.assert_close(_loss(toy, batch)[None], f"out.loss{i}")
    heads = importance(toy, "gradient", "attn", data=batches, objective=_loss)["attn"]
    golden.assert_close(heads, "out.head_importance")
    golden.assert_close(heads / heads.norm(), "out.head_importance_l2norm")
    neurons = importance(toy, "sides", "ffn", data=batches, objective=_loss)["ffn"]
    golden.assert_close(neurons, "out.neuron_importance")
    golden.assert_close(neurons.argsort(descending=True), "out.neuron_order")
    golden.assert_close(heads.argsort(descending=True), "out.head_order")
    _check_masks(golden, toy, batches)
    _check_widths(golden)


def _loss(model: nn.Module, batch: dict[str, Tensor], *_: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def _check_masks(golden: Golden, toy: Toy, batches: list[dict[str, Tensor]]) -> None:
    weight = toy.ffn.fc1.weight.detach()
    movement = Movement(weight.shape, lr=golden.config["movement_lr"])
    for batch in batches:
        grad = torch.autograd.grad(_loss(toy, batch), toy.ffn.fc1.weight)[0]
        movement.update(weight, grad)
    golden.assert_close(movement.scores, "out.movement_score_w1")
    _mask(golden, magnitude_mask(movement.scores, 0.5), "out.movement_mask_w1_50pct")
    _mask(golden, magnitude_mask(weight.abs(), 0.5), "out.magnitude_mask_w1_50pct")
    layer = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))  # reads in.X itself
    layer[0].weight = toy.ffn.fc1.weight
    given = [{"input": batch["x"]} for batch in batches]
    seen = observed(layer, given, ["0"], where="test")["0"]
    golden.assert_close(wanda_scores(weight, seen.norms), "out.wanda_metric_w1")
    _, masks = sparsify(layer, {"kind": "wanda"}, data=given)
    _mask(golden, masks.masks["0"], "out.wanda_mask_w1_50pct")
    _mask(golden, n_of_m_mask(weight.abs(), 2, 4), "out.mask_2of4_w1")
    golden.assert_close(block_scores(weight, (4, 4)), "out.block4x4_l2_w1")


def _mask(golden: Golden, mask: Tensor, key: str) -> None:
    golden.assert_close(mask.to(golden.tensor(key).dtype), key)


def _check_widths(golden: Golden) -> None:
    table = [dyna_widths(768, 3072, 12, share) for share in (0.25, 0.5, 0.75, 1.0)]
    golden.assert_close(torch.tensor(table), "dynabert.width_table")
    for key in golden.keys("dynabert.kept_layers_"):
        share = float(key.removeprefix("dynabert.kept_layers_"))
        golden.assert_close(torch.tensor(dyna_layers(12, share)), key)
