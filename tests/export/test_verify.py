from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from effformer.compress import quantize
from effformer.export import (
    ExportError,
    ExportReport,
    Session,
    VerificationError,
    export_onnx,
    verify_onnx,
)
from effformer.export.conditions import holds
from torch import Tensor, nn

from effformer.attention import Core, CoreConfig
from effformer.context import EMPTY, Context
from effformer.site import Site

from .networks import Mlp


def test_reports_every_output_of_every_case(exported: ExportReport, mlp: Mlp) -> None:
    report = verify_onnx(exported.path, mlp, torch.randn(4, 5, 32), cases=4, threads=1)
    assert report.passed
    assert not report.constant
    assert len(report.cases) == 1 + 4
    assert all(len(case.outputs) == 1 for case in report.cases)
    assert report.max_rel == max(c.outputs[0].max_rel for c in report.cases) < 1e-4
    assert report.to_dict()["cases"][0]["shapes"] == {"x": [4, 5, 32]}


def test_finds_other_weights(exported: ExportReport) -> None:
    torch.manual_seed(3)
    with pytest.raises(VerificationError, match="output 'output' differs from torch's") as caught:
        verify_onnx(exported.path, Mlp(), torch.randn(2, 5, 32))
    assert caught.value.report is not None
    assert caught.value.report.max_rel > 1e-2


def test_finds_a_graph_that_is_right_at_the_traced_shape_only(tmp_path: Path) -> None:
    class Baked(nn.Module):
        """Mean over the batch: with the length of the trace it would be a constant."""

        def __init__(self, length: int | None) -> None:
            super().__init__()
            self.length = length

        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0, keepdim=True) / (self.length or x.shape[0]) + x

    x = torch.randn(2, 3)
    export_onnx(Baked(2), tmp_path / "m.onnx", x, verify=False)
    with pytest.raises(VerificationError):
        verify_onnx(tmp_path / "m.onnx", Baked(None), x)


def test_refuses_what_does_not_fit(exported: ExportReport, mlp: Mlp) -> None:
    with pytest.raises(VerificationError, match=r"takes 'x' \('batch', 5, 32\), the example is"):
        verify_onnx(exported.path, mlp, torch.randn(2, 6, 32))

    class Other(nn.Module):
        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return z, z

    with pytest.raises(VerificationError, match="'x' is missing"):
        verify_onnx(exported.path, Other(), torch.randn(2, 5, 32))

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(VerificationError, match="returns 2 tensors, the graph 1"):
        verify_onnx(exported.path, Two(), torch.randn(2, 5, 32))


def test_says_if_the_output_is_constant(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4))
    assert report.parity is not None
    assert report.parity.constant
    assert report.parity.max_rel == 0


def test_values_that_are_not_finite_do_not_agree(tmp_path: Path) -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (-x.abs()).log()

    with pytest.raises(VerificationError, match="is not finite"):
        export_onnx(Log(), tmp_path / "m.onnx", torch.randn(2, 4))


def test_the_example_itself_is_compared(tmp_path: Path) -> None:
    class Own(nn.Module):
        """A table for the example's length, a formula for others and in graphs."""

        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_exporting() or x.shape[1] != 6:
                return x * 2
            return x * 3

    axes = {"x": {0: "batch", 1: "tokens"}}
    with pytest.raises(VerificationError, match=r"differs .* at x \(2, 6, 4\)"):
        export_onnx(Own(), tmp_path / "m.onnx", torch.randn(2, 6, 4), dynamic=axes)


def test_a_model_that_accepts_too_few_sizes(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and x.shape[0] not in (2, 3):
                raise ValueError("2 or 3 rows")
            return x * 2

    with pytest.raises(VerificationError, match=r"runs at only 0 other lengths of batch.*2 or 3"):
        export_onnx(Two(), tmp_path / "m.onnx", torch.randn(2, 4))


class Chunked(Core):
    """The mean of the last chunk, whose graph is right for one chunk only, as a trace of fewer
    tokens than a chunk may be.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        chunk: int = 40

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        if torch.compiler.is_exporting():
            return v + v.mean(dim=2, keepdim=True)
        return v + v.split(40, dim=2)[-1].mean(dim=2, keepdim=True)

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        return 0


class Around(nn.Module):
    """A core in a model that takes up to so many tokens."""

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.core = Chunked(Chunked.Config(), Site(dim=4, heads=1))
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and self.most and x.shape[1] > self.most:
            raise ValueError(f"at most {self.most} tokens")
        heads = x[:, None]
        return self.core(heads, heads, heads)[:, 0]


TOKENS = {"x": {0: "batch", 1: "tokens"}}


def test_looks_beyond_the_chunks_of_the_parts(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 4)
    with pytest.raises(VerificationError, match=r"differs .*at x \(1, 86, 4\)"):
        export_onnx(Around(), tmp_path / "m.onnx", x, dynamic=TOKENS)
    report = export_onnx(Around(most=30), tmp_path / "m.onnx", x, dynamic=TOKENS)
    assert report.parity is not None
    assert report.parity.lengths == {"batch": (2, 1, 3, 2), "tokens": (5, 20, 1, 7)}


def test_looks_far_at_the_least_and_between(tmp_path: Path) -> None:
    class Total(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.sum(1, keepdim=True)

    report = export_onnx(Total(), tmp_path / "m.onnx", torch.randn(2, 6, 4), dynamic=TOKENS)
    assert report.parity is not None
    assert report.parity.lengths == {"batch": (2, 1, 3, 2), "tokens": (6, 25, 1, 9)}
    assert report.parity.to_dict()["lengths"]["tokens"] == [6, 25, 1, 9]
    assert report.ranges == report.parity.ranges == {}


class Narrow(nn.Module):
    """What is written for few tokens; the graph keeps what the example took."""

    def __init__(self, most: int | None) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        if self.most and x.shape[1] > self.most:
            raise ValueError(f"at most {self.most} tokens")
        return x * 2 if x.shape[1] <= 8 else x * 3


def test_where_the_tracer_holds_the_graph_is_said(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 4)
    report = export_onnx(Narrow(8), tmp_path / "m.onnx", x, dynamic=TOKENS)
    assert report.ranges == {"tokens": (2, 8)}
    assert report.parity is not None
    assert report.parity.lengths["tokens"] == (5, 8, 1, 7)
    with pytest.raises(
        VerificationError, match=r"holds from 2 to 8 'tokens' only.*another example"
    ):
        export_onnx(Narrow(None), tmp_path / "m.onnx", x, dynamic=TOKENS)


def test_a_constant_length_is_refused_with_what_would_work(tmp_path: Path) -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (
                x + torch.arange(len(x[0]), dtype=torch.float32)[:, None] if len(x[0]) == 5 else x
            )

    with pytest.raises(
        ExportError, match=r"serves 5 'tokens' only.*leave that axis out of 'dynamic"
    ):
        export_onnx(One(), tmp_path / "m.onnx", torch.randn(2, 5, 4), dynamic=TOKENS)


def test_a_graph_that_fails_where_the_model_runs(tmp_path: Path) -> None:
    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_exporting():
                return x.unflatten(1, (-1, 2)).sum(2)
            return x.unflatten(1, (-1, 2)).sum(2) if x.shape[1] % 2 == 0 else x

    with pytest.raises(VerificationError, match=r"runs at x \(1, 25, 4\), the graph does not"):
        export_onnx(Pairs(), tmp_path / "m.onnx", torch.randn(2, 6, 4), dynamic=TOKENS)


def _export(
    folder: Path, forward: Callable[[Tensor], Tensor], *shape: int, axes: str = "batch tokens"
) -> ExportReport:
    """Export a function of one tensor whose leading axes vary, "-" the fixed ones."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    names = {i: symbol for i, symbol in enumerate(axes.split()) if symbol != "-"}
    return export_onnx(Model(), folder / "m.onnx", torch.randn(*shape), dynamic={"x": names})


@pytest.mark.parametrize(
    ("branch", "said"),
    [
        (lambda x: x.shape[1] < 100, "2 to 99 'tokens' only"),
        (lambda x: x.shape[0] < 5, "2 to 4 'batch' only"),
        (lambda x: x.shape[0] * x.shape[1] < 1000, r"where .*tokens.* < 1000 only"),
        (lambda x: x.shape[1] % 3 == 0, r"where \(tokens % 3\) == 0 only"),
    ],
)
def test_every_branch_on_lengths_is_compared_on_its_other_side(
    branch: Callable[[Tensor], bool], said: str, tmp_path: Path
) -> None:
    with pytest.raises(VerificationError, match=said):
        _export(tmp_path, lambda x: x * 2 if branch(x) else x * 3, 2, 6, 4)


def test_what_the_model_refuses_the_report_says(tmp_path: Path) -> None:
    def pooled(x: Tensor) -> Tensor:
        if x.shape[2] % 4:
            raise ValueError("rows of 4")
        return nn.functional.avg_pool2d(x, 4)

    report = _export(tmp_path, pooled, 2, 1, 12, 16, axes="batch - height")
    assert "(height % 4) == 0" in report.conditions
    assert report.parity is not None
    assert report.parity.conditions == report.conditions
    assert "(height % 4) == 0" in report.to_dict()["conditions"]


def test_equal_axes_are_said(tmp_path: Path) -> None:
    def one_form(x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] == x.shape[2] else x * 3

    report = _export(tmp_path, one_form, 2, 6, 6, axes="batch height width")
    assert report.conditions == ("height == width",)


@pytest.mark.parametrize(
    ("condition", "holds_at"),
    [
        ("n % 4 == 0", True), ("(n // 3)*m > 20 or n == 2", False), ("max(1, n) <= 8", True),
        ("float(n) ** 0.5 > 3.0", False), ("unknown < 3", None), ("n.real < 3", None),
        ("__import__('os').getpid() > 0", None), ("n %", None), ("n // 0 == 1", None),
        ("9**9**9**9 > n", None), ("-" * 100_000 + "n", None),
    ],
)  # fmt: skip
def test_conditions_are_read_as_arithmetic(condition: str, holds_at: bool | None) -> None:
    assert holds(condition, {"n": 8, "m": 5}) is holds_at


class Growing(nn.Module):
    """A table for as many tokens as it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.most:
            self.most = x.shape[1]
            table = torch.arange(self.most, dtype=torch.float32).cos()[:, None]
            self.register_buffer("table", table, persistent=False)
        return x * self.table[: x.shape[1]]


class First(nn.Module):
    """Divides by the number of tokens that it sees first."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: float | None = None
        self.masks: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = 1 / x.shape[1]
            self.masks["first"] = x
        return x * self.scale


@pytest.mark.parametrize("kind", [Growing, First])
def test_caches_are_filled_in_the_graph_and_not_by_trial_runs(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    model, x = kind(), torch.randn(2, 40, 4)
    report = export_onnx(model, tmp_path / "m.onnx", x[:, :6], dynamic=TOKENS)
    assert (report.ranges, report.conditions) == ({}, ())
    assert not dict(model.named_buffers())
    assert vars(model).get("scale") is None
    assert not vars(model).get("masks")
    found = torch.from_numpy(Session(tmp_path / "m.onnx").run({"x": x})["output"])
    torch.testing.assert_close(found, model(x))


def test_a_model_that_remembers_is_refused(tmp_path: Path) -> None:
    class Mean(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.mul_(0.9).add_(x.mean((0, 1)))
            return x - self.seen

    with pytest.raises(ExportError, match=r"changes its buffer 'seen'.*take the state as an input"):
        export_onnx(Mean(), tmp_path / "m.onnx", torch.randn(2, 6, 4), verify=False)


def test_half_graphs_are_held_to_the_error_of_the_half_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64))
    x = torch.randn(2, 256)
    report = export_onnx(model.half(), tmp_path / "m.onnx", x.half())
    assert report.parity is not None
    allowed = [o.allowed for case in report.parity.cases for o in case.outputs]
    assert 1e-4 < report.parity.max_rel < max(allowed) < 1e-2
    with torch.no_grad():
        model[0].weight.mul_(1.02)
    with pytest.raises(VerificationError, match="differs from torch's"):
        verify_onnx(tmp_path / "m.onnx", model, x.half())


class Halfway(nn.Module):
    """Gives a layer that rounds its inputs to 127 steps values which lie between two of them, or
    almost so.
    """

    def __init__(self, off: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(32, 8)
        self.off = nn.Buffer(1 + off * torch.tensor([0.0, *[1.0] * 31]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * self.off)


def test_values_between_two_steps_may_fall_to_either_side(tmp_path: Path) -> None:
    x = torch.cat([torch.full((4, 1), 127.0), torch.randint(60, (4, 31)) + 0.5], dim=1)
    below, above = (quantize(Halfway(off), "w8a8", where="fc")[0] for off in (-1e-6, 1e-6))
    path = export_onnx(below, tmp_path / "m.onnx", x).path
    report = verify_onnx(path, above, x, cases=1)
    assert 1e-3 < report.max_rel <= report.cases[0].outputs[0].allowed < 0.1
    above.get_submodule("fc").bias.data[0] += 0.3 * float(above(x).detach().abs().max())
    with pytest.raises(VerificationError, match="differs"):
        verify_onnx(path, above, x, cases=1)
    elsewhere = x.floor()  # no rounding error turns a value here, and a smaller fault is found
    assert verify_onnx(path, below, elsewhere, cases=1).max_rel < 1e-6
    below.get_submodule("fc").bias.data[0] += 5e-4 * float(below(elsewhere).detach().abs().max())
    with pytest.raises(VerificationError, match=r"allowed 1e-04"):
        verify_onnx(path, below, elsewhere, cases=1)
