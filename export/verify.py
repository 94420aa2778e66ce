"""ONNX Runtime against torch, at other shapes than the traced one: an export is not done until
compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.calls import Call, Inputs, evaluating
from effformer.notebook import Shown
from effformer.values import Positive, Threads, Times
from effformer.wrapped import unwrapping

from .conditions import ends_of, holds
from .graph import GraphFacts, read_graph
from .inputs import Axes, graph_call
from .lengths import Lengths, Ranges
from .runs import TooFewError, other_runs, other_sides, quiet_run, shaken_runs
from .session import Session

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Case", "OutputError", "VerificationError", "VerifyReport", "verify_onnx"]

TRACED, RANGES, CONDITIONS = "effformer.traced", "effformer.ranges", "effformer.conditions"
_HALF = (torch.float16, torch.bfloat16)
_RUNS = 16
"""Of a model with rounding errors added: each turns about half of the values that a graph may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """Difference of one output.

    Attributes:
        name: name of the output.
        max_abs: ``max |onnx - torch|``; infinite where shapes, types or finiteness differ. Torch
            computes in float64 for models in half precision.
        max_rel: ``max |onnx - torch| / max |torch|``.
        constant: torch's output is one number everywhere, so that agreement says little (a DiT
            before training is 0).
        allowed: largest accepted ``max_rel``.
    """

    name: str
    max_abs: float
    max_rel: float
    constant: bool
    allowed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison.

    Attributes:
        shapes: shape of every input.
        outputs: differences.
    """

    shapes: Mapping[str, tuple[int, ...]]
    outputs: tuple[OutputError, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport(Shown):
    """What was compared, and how well it agrees.

    Attributes:
        path: the file.
        tolerance: largest accepted ``max_rel``; in half precision see `verify_onnx`.
        cases: the comparisons.
        lengths: the lengths of every symbol, case by case.
        ranges: symbol -> least and largest length that the tracer holds the graph for, where it
            does not hold it for all (None: any).
        conditions: what else the tracer took for granted about lengths.
    """

    path: Path
    tolerance: float
    cases: tuple[Case, ...]
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranges: Ranges = field(default_factory=dict)
    conditions: tuple[str, ...] = ()

    @property
    def max_abs(self) -> float:
        """Largest absolute difference."""
        return max(o.max_abs for c in self.cases for o in c.outputs)

    @property
    def max_rel(self) -> float:
        """Largest relative difference."""
        return max(o.max_rel for c in self.cases for o in c.outputs)

    @property
    def passed(self) -> bool:
        """Every difference is within the tolerance."""
        return all(map(_agrees, self.cases))

    @property
    def constant(self) -> bool:
        """Every output of torch was one number everywhere."""
        return all(o.constant for c in self.cases for o in c.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        cases = [
            {
                "shapes": {n: list(s) for n, s in c.shapes.items()},
                "outputs": [
                    {
                        "name": o.name,
                        "max_abs": o.max_abs,
                        "max_rel": o.max_rel,
                        "constant": o.constant,
                        "allowed": o.allowed,
                    }
                    for o in c.outputs
                ],
            }
            for c in self.cases
        ]
        return {
            "path": str(self.path), "tolerance": self.tolerance, "passed": self.passed,
            "max_abs": self.max_abs, "max_rel": self.max_rel, "constant": self.constant,
            "lengths": {s: list(n) for s, n in self.lengths.items()},
            "ranges": {s: list(r) for s, r in self.ranges.items()},
            "conditions": list(self.conditions),
            "cases": cases,
        }  # fmt: skip


class VerificationError(ValueError):
    """A graph does not compute what the model computes.

    Attributes:
        report: the comparison, None if it could not be made.
    """

    def __init__(self, message: str, report: VerifyReport | None = None) -> None:
        super().__init__(message)
        self.report = report


@checked
@unwrapping
def verify_onnx(
    path: str | Path,
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    cases: Times = 3,
    tolerance: Positive = 1e-4,
    threads: Threads | None = None,
    generator: torch.Generator | None = None,
) -> VerifyReport:
    """Compare an ONNX file with the module it was exported from.

    First comes the example itself. Then the symbols of the graph's inputs tell what may vary. The
    first one (batch) takes 1, 3, 2, 4, ... The others go, in this order, far: four times their
    length in ``inputs``, and beyond twice every chunk, window or number of landmarks of the model
    (`effformer.attention.Core.turns`), and past the end of the range that the tracer gave; to 1, or
    2; to one and a half times, half, ... their length. For every branch on lengths that the tracer
    took, the graph is compared on the other side, too, up to a length of 1,024. Sizes that the model
    itself refuses are passed over. A graph without symbols is compared at its one shape with other
    values.

    A graph in half precision is compared with the model in float64, from which it may differ by
    four times as much as the model itself does in half precision, and one rounding.

    Args:
        path: the file.
        model: the module; evaluated in eval mode, its state is put back.
        inputs: example inputs, as for `export_onnx`.
        cases: number of comparisons beside that of the example.
        tolerance: largest accepted ``max |onnx - torch| / max |torch|`` of every output. Where packed
            layers round their inputs (w8a8, ...), values that lie between two steps fall to either
            side by rounding errors, and later layers follow: there a graph may differ by twice as
            much as the model itself does when rounding errors are added to those inputs, in up to
            16 runs.
        threads: threads of ONNX Runtime.
        generator: randomness of the values; None is a fresh one with seed 0.

    Raises:
        FormatError: not an ONNX file that ONNX Runtime loads.
        ValueError: the tolerance is not positive.
        VerificationError: inputs or outputs do not fit, the model runs at too few shapes, or a
            difference is above the tolerance.
    """
    graph, session = read_graph(path), Session(path, threads=threads)
    call = graph_call(model, inputs, where="verify")
    axes = _axes(graph, call)
    draws = torch.Generator().manual_seed(0) if generator is None else generator
    found: list[Case] = []
    lengths: list[Lengths] = []
    ranges, conditions = read_ranges(graph), read_conditions(graph)
    traced = json.loads(graph.metadata.get(TRACED, "{}"))
    with evaluating(model):
        exact = _exact(model, call)
        runs = other_runs(model, call, axes, ranges, conditions, traced, draws)
        taken = [*ends_of(ranges), *conditions]
        more = other_sides(model, call, axes, taken, draws, lengths)
        try:
            for some, other, expected in chain(islice(runs, 1 + cases), more):
                allowed = _allowed(exact, other, expected, tolerance)
                beyond = _beyond(some, ranges, conditions)
                case = _compare(session, other, expected, allowed, beyond)
                found.append(_as_rounded(case, model, other, expected))
                lengths.append(some)
        except TooFewError as error:
            raise VerificationError(f"verify: {error}") from error
    report = VerifyReport(
        path=Path(path), tolerance=tolerance, cases=tuple(found), ranges=ranges,
        conditions=conditions,
        lengths={symbol: tuple(some[symbol] for some in lengths) for symbol in lengths[0]},
    )  # fmt: skip
    if not report.passed:
        raise VerificationError(_explain(report), report)
    return report


def read_ranges(graph: GraphFacts) -> dict[str, tuple[int, int | None]]:
    """Where the tracer holds a graph that `export_onnx` wrote; symbols without a bound are left
    out.
    """
    given = json.loads(graph.metadata.get(RANGES, "{}"))
    return {symbol: (least, most) for symbol, (least, most) in given.items()}


def read_conditions(graph: GraphFacts) -> tuple[str, ...]:
    """What else the tracer took for granted about lengths."""
    return tuple(map(str, json.loads(graph.metadata.get(CONDITIONS, "[]"))))


def _axes(graph: GraphFacts, call: Call) -> Axes:
    names = [v.name for v in graph.inputs]
    if missing := [n for n in names if n not in call.tensors]:
        raise VerificationError(
            f"verify: the graph takes {names}, the example inputs are {list(call.tensors)}; "
            f"{missing[0]!r} is missing"
        )
    axes: Axes = {}
    for value in graph.inputs:
        have = tuple(call.tensors[value.name].shape)
        fits = len(have) == len(value.shape) and all(
            want == n or not isinstance(want, int)
            for n, want in zip(have, value.shape, strict=True)
        )
        if not fits:
            raise VerificationError(
                f"verify: the graph takes {value.name!r} {value.shape}, the example is {have}"
            )
        axes[value.name] = {i: d for i, d in enumerate(value.shape) if isinstance(d, str)}
    return axes


def _exact(model: nn.Module, call: Call) -> nn.Module | None:
    """The model in float64 if it computes in half precision."""
    tensors = (*model.parameters(), *model.buffers(), *call.leaves)
    if not any(x.dtype in _HALF for x in tensors):
        return None
    return deepcopy(model).double()


def _allowed(
    exact: nn.Module | None, call: Call, expected: list[Tensor], tolerance: float
) -> list[float]:
    """Largest accepted error of every output; in half precision ``expected`` is replaced by what
    the model gives in float64.
    """
    if exact is None:
        return [tolerance] * len(expected)
    wide = call.map(lambda x: x.double() if x.is_floating_point() else x)
    allowed, half = [], list(expected)
    expected[:] = quiet_run(exact, wide)
    for rounded, true in zip(half, expected, strict=True):
        own = _difference("", rounded.float().numpy(), true, 0.0).max_rel
        one = torch.finfo(rounded.dtype).eps if rounded.is_floating_point() else 0.0
        allowed.append(max(tolerance, 4 * own + one))
    return allowed


def _beyond(lengths: Lengths, ranges: Ranges, conditions: tuple[str, ...]) -> str:
    """What to add to a difference at lengths at which the trace does not hold."""
    for symbol, n in lengths.items():
        least, most = ranges.get(symbol, (1, None))
        if n < least or (most is not None and n > most):
            end = "on" if most is None else f"to {most}"
            return (
                f"; the trace holds from {least} {end} {symbol!r} only, because the example lies on "
                "one side of a length at which a part changes its form: give another example, or "
                "leave this axis out of 'dynamic'"
            )
    for condition in conditions:
        if holds(condition, lengths) is False:
            return (
                f"; the trace holds where {condition} only, because the example lies on one side of "
                "a branch: give another example, or leave such an axis out of 'dynamic'"
            )
    return ""


def _compare(
    session: Session, call: Call, expected: list[Tensor], allowed: list[float], beyond: str
) -> Case:
    shapes = {n: tuple(x.shape) for n, x in call.tensors.items()}
    try:
        actual = session.run(call.tensors)
    except RuntimeError as error:
        shown = ", ".join(f"{n} {s}" for n, s in shapes.items())
        raise VerificationError(
            f"verify: the model runs at {shown}, the graph does not{beyond} ({error})"
        ) from error
    if len(expected) != len(actual):
        raise VerificationError(
            f"verify: the model returns {len(expected)} tensors, the graph {len(actual)}"
        )
    outputs = tuple(
        _difference(n, a, e, most)
        for (n, a), e, most in zip(actual.items(), expected, allowed, strict=True)
    )
    return Case(shapes=shapes, outputs=outputs)


def _as_rounded(case: Case, model: nn.Module, call: Call, expected: list[Tensor]) -> Case:
    """A case that allows what the model itself turns by, where it rounds what its layers are given."""
    if _agrees(case):
        return case
    with closing(shaken_runs(model, call)) as runs:
        for found in islice(runs, _RUNS):
            outputs = tuple(
                replace(o, allowed=max(o.allowed, 2 * _turned(y, e)))
                for o, y, e in zip(case.outputs, found, expected, strict=True)
            )
            case = replace(case, outputs=outputs)
            if _agrees(case):
                break
    return case


def _agrees(case: Case) -> bool:
    return all(o.max_rel <= o.allowed for o in case.outputs)


def _turned(found: Tensor, expected: Tensor) -> float:
    """How far a run of the model itself is off; 0 where that is no number."""
    if not found.is_floating_point():
        return 0.0
    off = _difference("", found.float().numpy(), expected, 0.0).max_rel
    return off if math.isfinite(off) else 0.0


def _difference(
    name: str, array: np.ndarray[Any, Any], expected: Tensor, allowed: float
) -> OutputError:
    actual = torch.from_numpy(array)
    constant = expected.numel() == 0 or bool((expected == expected.flatten()[0]).all())
    made = partial(OutputError, name=name, constant=constant, allowed=allowed)
    worst = made(max_abs=math.inf, max_rel=math.inf)
    if actual.shape != expected.shape or actual.is_floating_point() != expected.is_floating_point():
        return worst
    a, e = actual.double(), expected.double()
    if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(e).all()):
        return worst
    if e.numel() == 0:
        return made(max_abs=0.0, max_rel=0.0)
    absolute, scale = float((a - e).abs().max()), float(e.abs().max())
    relative = absolute / scale if scale else float("inf") if absolute else 0.0
    return made(max_abs=absolute, max_rel=relative)


def _explain(report: VerifyReport) -> str:
    place, output = max(
        ((i, o) for i, c in enumerate(report.cases) for o in c.outputs),
        key=lambda pair: pair[1].max_rel / pair[1].allowed,
    )
    shapes = ", ".join(f"{n} {s}" for n, s in report.cases[place].shapes.items())
    lengths = {s: n[place] for s, n in report.lengths.items()}
    beyond = _beyond(lengths, report.ranges, report.conditions)
    if output.max_rel == float("inf"):
        what = "differs in shape or type from torch's, or is not finite"
    else:
        what = f"differs from torch's by {output.max_rel:.2e} of its largest value"
        what += f" (allowed {output.allowed:.0e})"
    return f"verify: output {output.name!r} {what}, at {shapes}{beyond}"
