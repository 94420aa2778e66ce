"""Forms of chunked attentions that serve every length, as captured graphs hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import Session, export_onnx
from torch import Tensor, nn

from effformer.attention import Core
from effformer.attention.performer import PerformerState
from effformer.config import resolve
from effformer.context import Context, Rope
from effformer.site import Site

TOLERANCE = 1e-10


def core_of(name: str, **options: Any) -> Core:
    torch.manual_seed(0)
    config = resolve("core", {"name": name, "causal": True, **options})
    core: Core = config.build(Site(dim=12, heads=2)).eval()
    return core


def assert_same(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    atol = tolerance * max(float(expected.detach().abs().max()), 1e-30)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol)


@pytest.mark.parametrize(
    "options", [{}, {"kernel": "relu"}, {"stabilizer": "global"}], ids=["plain", "relu", "global"]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [3, 8, 21])
def test_performers_chunks_side_by_side_are_those_in_turn(
    options: dict[str, Any], masked: bool, n: int
) -> None:
    core = core_of("performer", chunk=4, features=5, **options).double()
    q, k, v = (torch.randn(2, 2, n, 6, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    mask = torch.arange(n) >= torch.tensor([[2], [0]]) if masked else None
    mask = None if mask is None else mask[:, None]
    _, past = core._scan(*torch.randn(3, 2, 2, 5, 6, dtype=torch.float64), None, None)
    top = core._largest(k, mask) if core.config.stabilizer == "global" else None
    results = []
    for out, state in (
        core._scan(q, k, v, mask, past),
        core._side_by_side(q, k, v, mask, top, past),
    ):
        total = out.square().sum() + sum(x.sum() for x in state if x.requires_grad)
        results.append((out, *state, *torch.autograd.grad(total, (q, k, v))))
    assert len(results[0]) == 1 + len(PerformerState._fields) + 3
    for found, expected in zip(results[1], results[0], strict=True):
        assert_same(found, expected)


class Masked(nn.Module):
    """A core with a key mask and, if asked for, rotary tables."""

    def __init__(self, core: Core, *, turned: bool) -> None:
        super().__init__()
        self.core, self.turned = core, turned

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rope = None
        if self.turned:
            angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.tensor(
                [1.0, 0.1, 0.01]
            )
            angles = angles.repeat_interleave(2, dim=-1)
            rope = Rope(angles.cos(), angles.sin(), interleaved=True)
        return self.core(x, x.flip(-1), x * 2, Context(mask=mask, rope=rope))


@pytest.mark.parametrize(
    ("name", "turned"),
    [
        ("flow", True),
        *(
            pytest.param(name, turned, marks=pytest.mark.slow)
            for name, turned in [("flow", False), ("linear", False), ("linear", True)]
        ),
    ],
)
def test_causal_sums_are_a_node(name: str, turned: bool, tmp_path: Path) -> None:
    part, path = Masked(core_of(name), turned=turned), tmp_path / "m.onnx"
    inputs = {"x": torch.randn(2, 2, 7, 6), "mask": torch.ones(2, 7, dtype=torch.bool)}
    axes = {"x": {0: "batch", 2: "tokens"}, "mask": {0: "batch", 1: "tokens"}}
    report = export_onnx(part, path, inputs, dynamic=axes, verify=False)
    assert report.graph.operators["com.microsoft::LinearAttention"] == 1
    session = Session(path, threads=1)
    for n in (1, 33, 290):
        x, mask = (
            torch.randn(3, 2, n, 6),
            torch.arange(n) >= torch.tensor([[0], [n // 2], [n // 3]]),
        )
        found = torch.from_numpy(session.run({"x": x, "mask": mask})["output"])
        real = mask[:, None, :, None]  # rows without a key are not defined
        assert_same(found * real, part(x, mask).detach() * real, 1e-4)
