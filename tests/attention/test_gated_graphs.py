"""The gated recurrence in captured graphs: torch.export, torch.compile, ONNX whole and step by
step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effformer.export import ExportError, ExportReport, Session, export_onnx
from torch import Tensor, nn

from effformer.attention.gated_onnx import linear_scan_onnx
from effformer.attention.gated_scan import gated_scan, retention_decay
from effformer.attention.scan import causal_product
from effformer.nn.onnx_nodes import node_domains

from .test_gated_scan import RULES, Inputs, assert_same


class Scan(nn.Module):
    """`gated_scan` with the decays of a rule."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.kind, self.delta = RULES[rule]
        self.register_buffer("constant", retention_decay(4).float())

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None,
        beta: Tensor | None = None, state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        g = self.constant if self.kind == "constant" else decay
        return gated_scan(q, k, v, g, beta, state, delta=self.delta, chunk=16)


class Sums(nn.Module):
    """Causal linear attention with its denominator."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if node_domains() is not None:
            numerator, denominator, last = linear_scan_onnx(q, k, v, state)
        else:
            ones = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
            out, last = causal_product(q, k, ones, state, chunk=16)
            numerator, denominator = out[..., :-1], out[..., -1:]
        return numerator / denominator, last


def given(rule: str, tokens: int, batch: int = 2, *, state: bool = True) -> dict[str, Tensor]:
    inputs = Inputs(rule, tokens, batch=batch, heads=2, values=4, dtype=torch.float32)
    named = {n: x.detach() for n, x in inputs.given().items()}
    if RULES[rule][0] == "constant":
        del named["decay"]
    if not state:
        del named["state"]
    return named


def axes(names: dict[str, Tensor]) -> dict[str, dict[int, str]]:
    both = {0: "batch", 2: "tokens"}
    return {n: {0: "batch"} if n == "state" else both for n in names}


def exported(rule: str, path: Path, *, state: bool = True) -> ExportReport:
    inputs = given(rule, 33, state=state)
    return export_onnx(Scan(rule), path, inputs, dynamic=axes(inputs), output_names=("out", "last"))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("rule", ["simple-gla", "kda"])
def test_an_exported_program_serves_every_length(rule: str, strict: bool) -> None:
    scan, dynamic = Scan(rule), torch.export.Dim.DYNAMIC
    inputs = given(rule, 33)
    shapes = {n: dict.fromkeys(a, dynamic) for n, a in axes(inputs).items()}
    program = torch.export.export(scan, (), inputs, dynamic_shapes=shapes, strict=strict)
    for tokens in (1, 7, 16, 33, 100):
        other = given(rule, tokens, 3)
        for a, e in zip(program.module()(**other), scan(**other), strict=True):
            assert_same(a, e, 1e-5)


@pytest.mark.parametrize("rule", ["simple-gla", pytest.param("kda", marks=pytest.mark.slow)])
def test_one_graph_trains(rule: str) -> None:
    scan, inputs = Scan(rule), given(rule, 33)
    torch.compiler.reset()
    found = []
    for function in (scan, torch.compile(scan, fullgraph=True, backend="aot_eager")):
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        out, last = function(**leaves)
        found.append((out, *torch.autograd.grad(out.sum() + last.sum(), list(leaves.values()))))
    for a, e in zip(*found, strict=True):
        assert_same(a, e, 1e-5)


def assert_one_node(report: ExportReport) -> None:
    assert report.graph.operators["com.microsoft::LinearAttention"] == 1
    assert "MatMul" not in report.graph.operators
    assert report.parity is not None
    assert report.parity.max_rel <= 1e-5


@pytest.mark.parametrize(
    "rule",
    [pytest.param(r, marks=() if r == "delta" else pytest.mark.slow) for r in RULES],
)
def test_one_node_whole_and_token_by_token(rule: str, tmp_path: Path) -> None:
    assert_one_node(exported(rule, tmp_path / "m.onnx"))
    session = Session(tmp_path / "m.onnx")
    for tokens in (1, 33, 200):
        inputs = given(rule, tokens, 3)
        whole = {n: torch.from_numpy(x) for n, x in session.run(inputs).items()}
        for name, expected in zip(("out", "last"), Scan(rule)(**inputs), strict=True):
            assert_same(whole[name], expected, 1e-5)
    state, outputs = inputs["state"], []
    for t in range(200):
        token = {n: x[:, :, t : t + 1].contiguous() for n, x in inputs.items() if n != "state"}
        found = session.run(token | {"state": state})
        outputs.append(torch.from_numpy(found["out"]))
        state = torch.from_numpy(found["last"])
    assert_same(torch.cat(outputs, dim=2), whole["out"], 1e-5)
    assert_same(state, whole["last"], 1e-5)


@pytest.mark.parametrize("rule", ["retention", "kda"])
def test_one_node_without_a_past(rule: str, tmp_path: Path) -> None:
    assert_one_node(exported(rule, tmp_path / "m.onnx", state=False))


def test_other_runtimes_take_one_token_in_standard_operators(tmp_path: Path) -> None:
    scan = Scan("gated-delta")
    inputs = given("gated-delta", 1)
    report = export_onnx(scan, tmp_path / "m.onnx", inputs, target="onnx")
    assert not [name for name in report.graph.operators if "::" in name]
    with pytest.raises(ExportError, match=r"choices: target 'onnx-cpu', or a graph of one token"):
        export_onnx(scan, tmp_path / "n.onnx", given("gated-delta", 33), target="onnx")


def test_normalised_linear_attention_is_one_node(tmp_path: Path) -> None:
    q, k = (torch.rand(2, 2, 33, 4) for _ in range(2))
    inputs = {"q": q, "k": k, "v": torch.randn(2, 2, 33, 3), "state": torch.rand(2, 2, 4, 4)}
    report = export_onnx(Sums(), tmp_path / "m.onnx", inputs, dynamic=axes(inputs))
    assert report.graph.operators["com.microsoft::LinearAttention"] == 1
    assert report.parity is not None
    assert report.parity.max_rel <= 1e-5
