"""Models of gated linear attention as ONNX graphs: one node per layer and direction, for any number
of tokens, whole or token by token."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import ExportReport, Session, export_onnx
from gated_mixers import DIM, make, same, turns
from torch import Tensor, nn

from effformer.attention.multihead import AttentionState
from effformer.build import build_model
from effformer.context import Context, Rope

NODE = "com.microsoft::LinearAttention"
CONV = "com.microsoft::CausalConvWithState"
UNTRACED = (1, 33, 200)

RETENTION: dict[str, Any] = {"name": "retention"}
GROUPED: dict[str, Any] = {"name": "gated-delta", "qk_heads": 2, "value_dim": 6}
SSD: dict[str, Any] = {"name": "ssd", "qk_heads": 1, "head_dim": 6}
CHANNELS: dict[str, Any] = {"name": "kda"}


class Layer(nn.Module):
    """A layer on tokens and rotary tables, if it turns."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part.float()

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        rope = None if cos is None or sin is None else Rope(cos, sin)
        return self.part(x, Context(rope=rope))


class Step(nn.Module):
    """The next tokens from the states of the layer, states as tensors."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part.float()

    def forward(self, x: Tensor, memory: Tensor, past: Tensor | None = None) -> tuple[Tensor, ...]:
        y, state = self.part.step(x, AttentionState(memory, past))
        return (y, state.core) if past is None else (y, state.core, state.conv)


def export(module: nn.Module, path: Path, inputs: dict[str, Tensor]) -> ExportReport:
    axes = {n: {0: "batch", 1: "tokens"} if n == "x" else {0: "batch"} for n in inputs}
    axes |= {n: {0: "tokens"} for n in inputs if n in ("cos", "sin")}
    return export_onnx(module, path, inputs, dynamic=axes, tolerance=1e-5)


def whole(module: nn.Module, path: Path, *, nodes: int, rope: bool) -> ExportReport:
    """Export a layer and compare at lengths that were not traced."""

    def inputs(n: int, batch: int) -> dict[str, Tensor]:
        tables = turns(n)
        more = {"cos": tables.cos.float(), "sin": tables.sin.float()} if rope else {}
        return {"x": torch.randn(batch, n, DIM), **more}

    report = export(module, path, inputs(17, 2))
    assert report.graph.operators[NODE] == nodes
    session = Session(path)
    for n in UNTRACED:
        given = inputs(n, 3)
        found = torch.from_numpy(session.run(given)["output"])
        same(found, module(**given).detach(), 1e-5)
    return report


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(RETENTION, marks=pytest.mark.slow),
        GROUPED,
        pytest.param(SSD, marks=pytest.mark.slow),
    ],
    ids=itemgetter("name"),
)
def test_a_causal_layer_is_one_node_for_any_length(layer: dict[str, Any], tmp_path: Path) -> None:
    part = make(**layer)
    report = whole(Layer(part), tmp_path / "m.onnx", nodes=1, rope=layer is RETENTION)
    assert report.graph.operators.get(CONV, 0) == (1 if part.config.short_conv else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "direction"), [
    (RETENTION, "both"), pytest.param(CHANNELS, "both", marks=pytest.mark.slow),
    pytest.param(GROUPED, "both-exclusive", marks=pytest.mark.slow),
])  # fmt: skip
def test_both_directions_are_two_nodes(
    layer: dict[str, Any], direction: str, tmp_path: Path
) -> None:
    part = make(**layer, causal=False, direction=direction)
    whole(Layer(part), tmp_path / "m.onnx", nodes=2, rope=layer is RETENTION)


@pytest.mark.slow
def test_alternating_directions_are_one_node(tmp_path: Path) -> None:
    part = make("gated-delta", causal=False, direction="alternate", layer=1)
    whole(Layer(part), tmp_path / "m.onnx", nodes=1, rope=False)


@pytest.mark.parametrize(
    "layer",
    [RETENTION, *(pytest.param(one, marks=pytest.mark.slow) for one in (CHANNELS, SSD))],
    ids=itemgetter("name"),
)
def test_step_by_step_the_graph_gives_the_whole(layer: dict[str, Any], tmp_path: Path) -> None:
    part = make(**layer)
    module, x = Step(part), torch.randn(2, 12, DIM)
    start = part.init_state(2, like=x)
    states = {"memory": start.core} | ({} if start.conv is None else {"past": start.conv})
    inputs = {"x": x[:, :3].clone(), **{n: torch.randn_like(s) for n, s in states.items()}}
    export(module, tmp_path / "m.onnx", inputs)
    session, outputs = Session(tmp_path / "m.onnx"), []
    for piece in x.split([1, 1, 1, 4, 1, 3, 1], dim=1):
        found = [torch.from_numpy(y) for y in session.run({"x": piece, **states}).values()]
        outputs.append(found[0])
        states = dict(zip(states, found[1:], strict=True))
    same(torch.cat(outputs, dim=1), part(x).detach(), 1e-5)


@pytest.mark.slow
def test_a_language_model_has_one_node_a_layer(tmp_path: Path) -> None:
    model = build_model(
        "flowformer-gpt-nano",
        attn="gated-delta",
        layers="1:1 gla",
        dim=16,
        heads=2,
        depth=2,
        vocab=20,
        context=256,
    ).eval()
    inputs = {"tokens": torch.randint(20, (2, 17))}
    report = export_onnx(model, tmp_path / "m.onnx", inputs, dynamic={
        "tokens": {0: "batch", 1: "tokens"}
    }, tolerance=1e-5)  # fmt: skip
    assert report.graph.operators[NODE] == 2
    session = Session(tmp_path / "m.onnx")
    for n in UNTRACED:
        given = {"tokens": torch.randint(20, (3, n))}
        found = torch.from_numpy(session.run(given)["output"])
        same(found, model(**given).detach(), 1e-5)


@pytest.mark.slow
def test_an_image_model_has_two_nodes_a_layer(tmp_path: Path) -> None:
    model = build_model("vit-nano", attn="gated-delta", depth=1).eval()
    report = export_onnx(model, tmp_path / "m.onnx")
    assert report.graph.operators[NODE] == 2
    assert report.parity is not None
    assert report.parity.max_rel <= 1e-4
