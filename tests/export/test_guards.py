"""Graphs refuse, in ONNX Runtime, lengths at which they would compute something else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from effformer.export import ExportReport, Session, export_onnx, quantize_onnx
from effformer.export.conditions import holds
from effformer.export.guards import guard, sentence
from torch import Tensor, nn

import effformer

AXES = {"x": {0: "batch", 2: "height", 3: "width"}}


class Cropping(nn.Module):
    """Patches of 2 x 2; the model refuses what a strided convolution would crop."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 4))
        self.proj = nn.Conv2d(3, 4, 2, stride=2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError("patches of 2 x 2")
        h = self.proj(x).flatten(2).transpose(1, 2)
        if h.shape[1] > 16:
            raise ValueError("at most 16 patches")
        if x.shape[0] != y.shape[0]:
            raise ValueError("one label for every image")
        return h + self.table[: h.shape[1]] + y[:, None, None]


@pytest.fixture(scope="module")
def cropping(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ExportReport]:
    torch.manual_seed(0)
    model = Cropping().eval()
    path = tmp_path_factory.mktemp("cropping") / "m.onnx"
    inputs = {"x": torch.randn(2, 3, 6, 4), "y": torch.randn(2)}
    return model, export_onnx(model, path, inputs, dynamic={**AXES, "y": {0: "batch"}})


BAD = [
    ((1, 3, 5, 4), 1, "height must be a multiple of 2, got x"),
    ((1, 3, 6, 7), 1, "width must be a multiple of 2"),
    ((2, 3, 10, 8), 2, r"must satisfy .*height.*width.* <= 16|must satisfy .*height.* <= 16"),
    ((3, 3, 6, 4), 1, "y must have as many entries of batch as x"),
]


@pytest.mark.parametrize("form", ["plain", "dynamic-uint8"])
def test_a_graph_refuses_in_the_runtime(
    cropping: tuple[nn.Module, ExportReport], form: Any, tmp_path: Path
) -> None:
    model, report = cropping
    path = report.path
    if form != "plain":

        class Product(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = model, nn.Linear(4, 8)

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return self.last(self.first(x, y))

        inputs = {"x": torch.randn(2, 3, 6, 4), "y": torch.randn(2)}
        axes = {**AXES, "y": {0: "batch"}}
        dense = export_onnx(Product(), tmp_path / "m.onnx", inputs, dynamic=axes, verify=False)
        path = quantize_onnx(dense.path, tmp_path / "q.onnx", form).path
    onnx.checker.check_model(path, full_check=True)
    session = Session(path, threads=1)
    for shape, labels, said in BAD:
        with pytest.raises(RuntimeError, match=f"^session: .*{said}"):
            session.run({"x": torch.randn(shape), "y": torch.randn(labels)})
    x, y = torch.randn(3, 3, 8, 8), torch.randn(3)
    found = torch.from_numpy(session.run({"x": x, "y": y})["output"])
    if form == "plain":
        with torch.no_grad():
            torch.testing.assert_close(found, model(x, y), rtol=1e-4, atol=1e-5)


def test_it_costs_a_few_numbers(cropping: tuple[nn.Module, ExportReport]) -> None:
    nodes = onnx.load(cropping[1].path).graph.node
    own = [n for n in nodes if n.name.startswith(("guard.", "refused: "))]
    assert len([n for n in own if n.op_type == "Reshape"]) == 4
    assert len(own) <= 32
    assert [n.op_type for n in nodes if n not in own].count("Conv") == 1


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_models_refuse_what_they_refuse_in_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = effformer.build_model("sit-nano", depth=1, num_classes=3, input_size=8).eval().to(dtype)
    inputs = {
        n: x.to(dtype) if x.is_floating_point() else x for n, x in model.example_inputs(2).items()
    }
    report = export_onnx(model, tmp_path / "m.onnx", inputs, tolerance=1e-3)
    assert report.ranges == {}
    assert report.conditions == ("(height % 2) == 0", "(width % 2) == 0")
    odd = inputs | {"x": inputs["x"][:, :, :7]}
    with pytest.raises(
        RuntimeError, match=r"^session: height must be a multiple of 2, got x \(2, 4, 7, 8\)"
    ):
        Session(report.path).run(odd)


@pytest.mark.slow
def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    model = effformer.build_model("bert-tiny", depth=1).eval()
    report = export_onnx(model, tmp_path / "m.onnx")
    ids = torch.ones(1, 65, dtype=torch.long)
    feed = {"tokens": ids, "segments": torch.zeros_like(ids), "mask": ids.bool()}
    with pytest.raises(RuntimeError, match=r"^session: tokens must be at most 64, got tokens"):
        Session(report.path).run(feed)


def _export(folder: Path, forward: Callable[[Tensor], Tensor], *shape: int) -> ExportReport:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    axes = {"x": {0: "batch", 1: "tokens"}}
    x = torch.randn(*shape)
    return export_onnx(Model(), folder / "m.onnx", x, dynamic=axes, verify=False)


def _halvings(x: Tensor) -> Tensor:
    n, count = x.shape[1], 0
    while n > 1:
        n, count = n // 2, count + 1
    return x * count


@pytest.mark.parametrize(
    ("branch", "inside", "beyond"),
    [
        (lambda x: x if x.shape[1] > 100 else x * 2, (2, 100), (101, 300)),
        (lambda x: x if x.shape[1] % 3 == 1 else x * 2, (5, 6, 9), (7, 100)),
        (lambda x: x if int(x.shape[1] ** 0.5) > 3 else x * 2, (9, 12, 15), (8, 16, 100)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (lambda x: x if math.ceil(x.shape[1] / 7) > 2 else x * 2, (2, 14), (15,)),
                (lambda x: x if x.shape[1] & 1 else x * 2, (2, 6), (3, 99)),
                (lambda x: x if round(x.shape[1] / 3) > 4 else x * 2, (2, 13), (14,)),
                (lambda x: x if x.shape[1] == 101 else x * 2, (2, 100), (101,)),
                (lambda x: x if x.shape[1] // 4 == 25 else x * 2, (2, 99, 104), (100, 103)),
                (lambda x: x if x.shape[1] * x.shape[0] > 50 else x * 2, (2, 25), (26,)),
            )
        ),
    ],
)  # fmt: skip
def test_a_branch_that_the_trace_did_not_take_is_refused(
    branch: Callable[[Tensor], Tensor],
    inside: tuple[int, ...],
    beyond: tuple[int, ...],
    tmp_path: Path,
) -> None:
    session = Session(_export(tmp_path, branch, 2, 12, 4).path, threads=1)
    for n in inside:
        x = torch.randn(2, n, 4)
        found = session.run({"x": x})["output"]
        torch.testing.assert_close(torch.from_numpy(found), branch(x))
    for n in beyond:
        with pytest.raises(RuntimeError, match=r"^session: (tokens must|lengths must satisfy)"):
            session.run({"x": torch.randn(2, n, 4)})


def test_the_sides_of_a_loop_are_kept(tmp_path: Path) -> None:
    report = _export(tmp_path, _halvings, 2, 12, 4)
    assert report.ranges == {"tokens": (8, 15)}
    session = Session(report.path, threads=1)
    for n in (1, 7, 16):
        with pytest.raises(RuntimeError, match=r"^session: tokens must be at"):
            session.run({"x": torch.randn(1, n, 4)})


def test_a_branch_that_changes_nothing_is_no_condition(tmp_path: Path) -> None:
    class Either(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x if x.shape[1] > 30 else x * 2

    report = export_onnx(
        Either(),
        tmp_path / "m.onnx",
        torch.randn(2, 6, 4),
        dynamic={"x": {0: "batch", 1: "tokens"}},
    )
    assert (report.ranges, report.conditions) == ({}, ())
    assert "Reshape" not in report.graph.operators


def test_what_the_model_refuses_at_length_one(tmp_path: Path) -> None:
    class Spread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and x.shape[1] * x.shape[2] < 2:
                raise ValueError("one value has no spread")
            return x / x.flatten(1).std(1)[:, None, None]

    axes = {"x": {0: "batch", 1: "height", 2: "width"}}
    report = export_onnx(Spread(), tmp_path / "m.onnx", torch.randn(2, 6, 4), dynamic=axes)
    assert report.conditions == ("max(height, width) >= 2",)
    session = Session(report.path, threads=1)
    assert session.run({"x": torch.randn(1, 1, 2)})["output"].shape == (1, 1, 2)
    with pytest.raises(RuntimeError, match="lengths must satisfy max"):
        session.run({"x": torch.randn(1, 1, 1)})


class Looks(nn.Module):
    """Rows of a table by the ids of an input, by ids of its own, and from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other, self.last = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 8)

    def forward(self, ids: Tensor, back: Tensor) -> Tensor:
        own = nn.functional.embedding(self.other.weight.argmax(0)[:1], self.other.weight)
        some = self.table(torch.where(ids > 7, 8, ids)[:, :2]) + self.table.weight[back]
        return self.last(some + own + self.table(ids[:, :2] % 4 + back))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embeddings_refuse_ids_outside_their_table(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Looks()
    ids, back = torch.randint(0, 9, (2, 3), dtype=dtype), torch.tensor([[1, 2], [0, 3]])
    report = export_onnx(model, tmp_path / "m.onnx", {"ids": ids, "back": back})
    assert report.graph.operators["Less"] == 2
    packed = quantize_onnx(report.path, tmp_path / "q.onnx", "dynamic-uint8")
    with pytest.raises(IndexError):
        model(torch.full_like(ids, -1), back)
    for path in (report.path, packed.path):
        session = Session(path, threads=1)
        found = torch.from_numpy(session.run({"ids": ids, "back": back})["output"])
        torch.testing.assert_close(found, model(ids, back), rtol=0, atol=5e-2)
        for wrong in (-1, -9, torch.iinfo(dtype).min):
            with pytest.raises(RuntimeError, match=r"^session: ids must lie in 0 to 8, got ids"):
                session.run({"ids": torch.full_like(ids, wrong), "back": back})
        with pytest.raises(RuntimeError, match="back and ids must give rows in 0 to 8, got ids"):
            session.run({"ids": ids, "back": back - 9})


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("(height % 2) == 0", "height must be a multiple of 2"),
        ("tokens <= 8", "tokens must be at most 8"),
        ("tokens >= 3", "tokens must be at least 3"),
        ("height == width", "lengths must satisfy height == width"),
    ],
)
def test_sentences(condition: str, said: str) -> None:
    assert sentence(condition) == said


CONDITIONS = [
    "n % 4 == 0", "((7 + n) // 8) == 2", "(-3 + n) // 2 > 2", "trunc(float(n) ** 0.5) == 3",
    "n*m <= 40 or n == 11", "not n == m", "max(1, n) - min(n, m, 5) < 6", "sqrt(n) > 2.9",
    "(n & 1) == 0", "(n | 2) != 7", "round(n / 3) > 3", "abs(-n) >= 8 and ceil(n / 7) < 2",
    "int(n / 2) == floor(n / 2)", "(n % (m // 9)) == 0", "n / m != 1",
]  # fmt: skip


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_graph_reads_conditions_as_the_report_does(condition: str, tmp_path: Path) -> None:
    ir = onnx_ir
    x = ir.Value(name="x", shape=ir.Shape(["n", "m"]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Neg", [x])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", x.shape, x.type
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    guard(model, {"x": {0: "n", 1: "m"}}, [condition], [])
    ir.save(model, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx", threads=1)
    for n in (1, 2, 4, 5, 8, 9, 11, 13, 16):
        for m in (1, 4, 9, 16):
            expected = holds(condition, {"n": n, "m": m})
            try:
                session.run({"x": torch.randn(n, m)})
                found = True
            except RuntimeError:
                found = False
            if expected is not None:  # a division by 0, which does not end the process
                assert found is expected, (n, m)


class _Twice(nn.Module):
    """Two tables of one size, read by the same ids."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(5, 4), nn.Embedding(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.one(ids) * self.other(ids)


def test_two_tables_of_one_size_refuse_the_same_ids(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    assert export_onnx(_Twice(), path, torch.tensor([[0, 4, 2]])).parity is not None
    with pytest.raises(RuntimeError, match=r"^session: ids must lie in 0 to 4, got ids"):
        Session(path).run({"ids": torch.tensor([[0, -1, 2]])})


@pytest.mark.slow
def test_labels_of_flows_are_refused_in_graphs(tmp_path: Path) -> None:
    model = effformer.build_model("tarflow-tiny").eval()
    export_onnx(model, tmp_path / "m.onnx")
    inputs = model.example_inputs(2)
    for wrong in (-1, 5):
        with pytest.raises(RuntimeError, match="y must lie in 0 to 4"):
            Session(tmp_path / "m.onnx").run({**inputs, "y": torch.tensor([0, wrong])})
