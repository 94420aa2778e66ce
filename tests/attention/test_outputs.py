"""The gate and the norm of the heads' outputs, around any core."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effformer.attention import Attention, Flow, Softmax
from effformer.attention.outputs import HeadOutput, OutputGate
from effformer.config import resolve
from effformer.context import Context
from effformer.site import Site

DIM, HEADS, WIDTH = 12, 3, 4


def make(gate: Any, core: Any = Softmax, **site: Any) -> Attention:
    config = Attention.Config(core=core.Config(), gate=gate)
    part = Attention(config, Site(dim=DIM, heads=HEADS, **site)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in part.parameters():
            p.copy_(torch.empty(p.shape, dtype=torch.float64).normal_(0, 0.4, generator=generator))
    return part


def plain(part: Attention) -> Attention:
    """The same without what becomes of the outputs."""
    without = Attention(part.config.replace(gate=None), part.site).double()
    without.load_state_dict(
        {k: v for k, v in part.state_dict().items() if not k.startswith("output.")}
    )
    return without


def outputs(*shape: int) -> tuple[Tensor, Tensor]:
    n = shape[0] if shape else 5
    out = torch.randn(2, HEADS, n, WIDTH, dtype=torch.float64)
    return out, torch.randn(2, n, DIM, dtype=torch.float64)


@pytest.mark.parametrize(("per", "rows"), [("head", HEADS), ("element", HEADS * WIDTH)])
@pytest.mark.parametrize("core", [Softmax, Flow])
def test_a_wide_open_gate_is_no_gate(per: str, rows: int, core: Any) -> None:
    part, x = make({"per": per, "bias": True}, core), torch.randn(2, 7, DIM, dtype=torch.float64)
    assert part.output.proj.weight.shape == (rows, DIM)
    with torch.no_grad():
        part.output.proj.bias.fill_(60.0)
    torch.testing.assert_close(part(x), plain(part)(x))


@pytest.mark.parametrize("per", ["head", "element"])
def test_a_gate_without_weights_is_half_open(per: str) -> None:
    part, x = make(per), torch.randn(2, 7, DIM, dtype=torch.float64)
    with torch.no_grad():
        part.output.proj.weight.zero_()
        part.proj.bias.zero_()
    torch.testing.assert_close(part(x), plain(part)(x) / 2)


def test_gates_are_named_in_short() -> None:
    assert Attention.Config(gate="head").gate == OutputGate(per="head")
    short = resolve("attention", {"name": "flow", "gate": "element"})
    assert resolve("attention", short.to_dict()) == short
    assert resolve("attention", {"name": "softmax", "gate": {"per": "element"}}).gate == short.gate
    assert Attention.Config(gate={"per": "element"}).gate == short.gate
    with pytest.raises(ValueError, match="unknown option 'par'"):
        Attention.Config(gate={"par": "element"})


@pytest.mark.parametrize("act", ["sigmoid", "silu", "identity"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("norm", ["none", "head", "groups"])
@pytest.mark.parametrize("per", ["none", "head", "element"])
def test_output_by_hand(per: str, norm: str, first: bool, act: str) -> None:
    config = OutputGate(per=per, act=act, norm=norm, first=first, bias=True, eps=0.1, groups=1)
    part, (out, x) = HeadOutput(config, DIM, HEADS, WIDTH).double(), outputs()
    if norm != "none":
        torch.nn.init.normal_(part.weight)

    def gated(y: Tensor) -> Tensor:
        if per == "none":
            return y
        gate = (x @ part.proj.weight.T + part.proj.bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return y * {"sigmoid": gate.sigmoid(), "silu": gate * gate.sigmoid(), "identity": gate}[act]

    def normed(y: Tensor) -> Tensor:
        if norm == "none":
            return y
        dims = -1 if norm == "head" else (1, 3)
        y = y / (y.square().mean(dim=dims, keepdim=True) + 0.1).sqrt()
        return y * (part.weight if norm == "head" else part.weight.view(1, HEADS, 1, WIDTH))

    expected = normed(gated(out)) if first else gated(normed(out))
    torch.testing.assert_close(part(out, x), expected)


def test_groups_of_heads_have_norms_of_their_own() -> None:
    part = HeadOutput(OutputGate(per="none", norm="groups", groups=2), DIM, 4, WIDTH).double()
    out, x = torch.randn(2, 4, 5, WIDTH, dtype=torch.float64), torch.randn(2, 5, DIM)
    halves = [
        y / (y.square().mean(dim=(1, 3), keepdim=True) + 1e-5).sqrt() for y in out.chunk(2, dim=1)
    ]
    torch.testing.assert_close(part(out, x), torch.cat(halves, dim=1))
    with pytest.raises(ValueError, match="4 heads do not divide into 3 groups"):
        HeadOutput(OutputGate(norm="groups", groups=3), DIM, 4, WIDTH)


def test_ranks() -> None:
    shapes = {"head": (WIDTH, DIM), 2: (2, DIM)}
    for rank, shape in shapes.items():
        part = HeadOutput(OutputGate(rank=rank, bias=True), DIM, HEADS, WIDTH)
        assert part.proj[0].weight.shape == shape
        assert part.proj[0].bias is None
        assert part.proj[1].bias.shape == (HEADS * WIDTH,)
        assert part.macs(5) == 5 * (shape[0] * DIM + shape[0] * HEADS * WIDTH)


def test_the_gate_reads_the_tokens_and_not_the_memory() -> None:
    part = make("head", memory_dim=6)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    memory = torch.randn(2, 4, 6, dtype=torch.float64)
    assert part.output.proj.weight.shape == (HEADS, DIM)
    with torch.no_grad():
        part.output.proj.weight.fill_(0.0)
        part.proj.bias.zero_()
    ctx = Context(memory=memory)
    torch.testing.assert_close(part(x, ctx), plain(part)(x, ctx) / 2)


def test_some_heads_keep_their_gates() -> None:
    for gate in ("head", "element", {"per": "element", "rank": 2}):
        part, x = make(gate), torch.randn(2, 7, DIM, dtype=torch.float64)
        width = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64).expand(2, -1)
        torch.testing.assert_close(
            part.select(torch.tensor([0, 2]))(x), part(x, Context(width=width))
        )
