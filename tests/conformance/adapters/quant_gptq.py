"""GPTQ, rounding to nearest on its grid, SmoothQuant's folding and its W8A8 rounding."""

from __future__ import annotations

from typing import Any

import torch
from effformer.compress.quant import QuantLinear, gptq, make_scheme, smooth
from effformer.compress.quant import blockwise as bw
from effformer.compress.quant.calibrate import Seen
from effformer.compress.quant.fold import points
from harness import Golden
from torch import Tensor, nn

from effformer.calls import bind


def check(golden: Golden) -> None:
    for case, config in enumerate(golden.config):
        _check_case(golden, f"c{case}", config)
    if "sq.in.x" in golden.tensors:
        _check_folding(golden)
        _check_w8a8(golden)


def _check_case(golden: Golden, case: str, config: dict[str, Any]) -> None:
    golden.only(
        "static_groups", config["act_order"], among=config,
        why="groups are fixed before columns are sorted, and read on the way otherwise",
    )  # fmt: skip
    weight, inputs = golden.tensor(f"{case}.in.W"), golden.tensor(f"{case}.in.X")
    group = config["groupsize"]
    knobs = gptq.GPTQ.Config(
        bits=config["bits"], block=None if group < 0 else group, symmetric=config["sym"],
        order=config["act_order"], lazy=config["lazy_block"], damp=config["percdamp"],
    )  # fmt: skip
    seen = Seen(weight.shape[1], ["second"])
    for batch in inputs:
        seen.add(batch)
    assert seen.second is not None
    # the official code counts a batch of rows as one sample
    golden.assert_close(seen.second * 2 / len(inputs), f"{case}.out.H")
    rows = gptq.solve(weight, seen.second, knobs)
    solved = _decoded(rows, knobs.bits, knobs.block)
    golden.assert_close(solved, f"{case}.out.W_gptq")
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight.data = weight.clone()
    nearest = QuantLinear.from_dense(dense, knobs).weight
    golden.assert_close(nearest, f"{case}.out.W_rtn")
    flat = inputs.flatten(0, 1)
    errors = [((w - weight) @ flat.t()).square().mean() for w in (solved, nearest)]
    golden.assert_close(torch.stack(errors), f"{case}.out.output_mse_gptq_rtn", rtol=1e-3)
    layer = QuantLinear.from_dense(dense, knobs, seen=seen)
    kept = ((layer.weight - weight) @ flat.t()).square().mean()
    assert kept <= min(errors) * (1 + 1e-5), "a layer keeps the better of both, row by row"


def _decoded(rows: bw.RowBlocks, bits: int, block: int | None) -> Tensor:
    zeros = 2.0 ** (bits - 1) if rows.zero_points is None else rows.zero_points.float()
    return bw.dequantize_rows(rows.codes.float(), rows.scales, zeros, block)


class _Readers(nn.Module):
    """A norm and the two layers that read it."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        weights = [golden.tensor(f"sq.in.{n}") for n in ("fc0", "fc1")]
        width = weights[0].shape[1]
        self.norm = nn.LayerNorm(width)
        self.norm.weight.data = golden.tensor("sq.in.ln_w").clone()
        self.norm.bias.data = golden.tensor("sq.in.ln_b").clone()
        self.layers = nn.ModuleList(nn.Linear(width, len(w), bias=False) for w in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data = weight.clone()

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.norm(x)
        return [layer(h) for layer in self.layers]


def _check_folding(golden: Golden) -> None:
    model, x = _Readers(golden), golden.tensor("sq.in.x")
    before = model(x)
    seen = Seen(x.shape[1], ["peak"])
    seen.peak = golden.tensor("sq.in.act_scales")  # synthetic: not those of x
    (point,) = points(model, bind(model, x, where="golden"))
    assert set(point.readers) == set(model.layers)
    scheme = smooth.SmoothQuant(smooth.SmoothQuant.Config(alpha=0.5))
    scale = scheme.scale(torch.cat([layer.weight.detach() for layer in point.readers]), seen)
    point.divide(scale)
    golden.assert_close(model.norm.weight, "sq.out.ln_w")
    golden.assert_close(model.norm.bias, "sq.out.ln_b")
    for i, layer in enumerate(model.layers):
        layer.weight.data *= scale
        golden.assert_close(layer.weight, f"sq.out.fc{i}")
    torch.testing.assert_close(model(x), before)


def _check_w8a8(golden: Golden) -> None:
    weight, scheme = golden.tensor("w8.in"), make_scheme("w8a8")
    golden.assert_close(scheme.decode(scheme.encode(weight), *weight.shape), "w8.per_channel")
    flat = weight.reshape(1, -1)  # one range for the whole tensor
    whole = scheme.decode(scheme.encode(flat), *flat.shape).view_as(weight)
    golden.assert_close(whole, "w8.per_tensor")
    golden.assert_close(scheme.prepare(weight, {}), "a8.per_token")
