"""Rotation of groups of channels: ConvRot's matrices, turned weights and inputs, and its 4-bit
arithmetic.

QuaRot's rotation of the residual stream, which a set may hold as well, has no counterpart here.
"""

from __future__ import annotations

import torch
from effformer.compress.quant import rotate, symmetric
from harness import Golden


def check(golden: Golden) -> None:
    golden.only("bits", 4, why="codes have 4 bits")
    for key in golden.keys("out.regular."):
        size = int(key.rpartition(".")[2])
        matrix = rotate.regular_hadamard(size, dtype=torch.float64)
        golden.assert_close(matrix, key, rtol=1e-7, atol=1e-9)
    for case, group in golden.config["group"].items():
        _check_case(golden, case, group)


def _check_case(golden: Golden, case: str, group: int) -> None:
    x, weight = golden.tensor(f"in.x.{case}"), golden.tensor(f"w.weight.{case}")
    sides = {"x": rotate.turn(x, group), "w": rotate.turn(weight, group)}
    for side, turned in sides.items():
        golden.assert_close(turned, f"out.{side}_rot.{case}", rtol=1e-7, atol=1e-9)
        codes, scales = symmetric.codes_of(turned, None, 7.0, 4)
        golden.assert_close(codes, f"out.codes.{side}.{case}", rtol=0, atol=0)
        golden.assert_close(scales, f"out.scale.{side}.{case}", rtol=1e-7, atol=1e-9)
    golden.assert_close(sides["x"] @ sides["w"].t(), f"out.y_rot.{case}", rtol=1e-7, atol=1e-9)
    golden.assert_close(x @ weight.t(), f"out.y.{case}", rtol=1e-7, atol=1e-9)
    inner = symmetric.W4A4.Config(block=None)
    scheme = rotate.Rotate(rotate.Rotate.Config(scheme=inner, group=group))
    n, k = weight.shape
    tensors = scheme.encode(weight)
    # the layer computes in float32
    golden.assert_close(
        scheme.linear(x.float(), tensors, n, k), f"out.y_q.{case}", rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(rotate.turn(rotate.turn(weight, group), group)[:, :k], weight)
