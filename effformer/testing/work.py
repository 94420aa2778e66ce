"""The contract of what a part says of its work, of half precision, of graphs, and of inputs that do not
fit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effformer.checks import is_refusal
from effformer.profile import Counter

from .closeness import assert_close
from .precision import KINDS, assert_near
from .report import Check, demand
from .subjects import DIM, Subject, context_for, is_dynamic, macs_of, run, tokens

__all__ = [
    "CHECKS",
    "LENGTHS",
    "Alone",
    "Calls",
    "answers_or_refuses",
    "operators",
    "serves_every_length",
]

Calls = Iterator[tuple[str, Callable[[], Any]]]
LENGTHS = (1, 7, 33, 150, 300)
"""Numbers of tokens below and above every default chunk; 7 is that of the trace."""


def operators(part: nn.Module, n: int, batch: int) -> int:
    """Multiply-adds of the operators that really run."""
    x = tokens(n, batch)
    with Counter(part) as counter:
        part(x, context_for(part, x))
    return sum(tally.macs for tally in counter.rows.values())


def macs_are_those_of_the_operators(subject: Subject) -> None:
    """``macs`` equals the work of one more sample; tables that the batch shares are no sample's."""
    for causal in subject.forms() if subject.kind == "attention" else [None]:
        part = subject.make(causal=causal)
        part.train(subject.kind != "attention" and is_dynamic(part))
        for n in (7, 130) if subject.kind == "attention" else (7,):
            ran = operators(part, n, 3) - operators(part, n, 2)
            said = macs_of(part, n)
            demand(said == ran, f"macs of {n} tokens is {said:,}, its operators do {ran:,}")


def half_precision_is_near_float64(subject: Subject) -> None:
    """In float16, bfloat16 and under autocast, large values included, as near as rounding explains."""
    for causal in subject.forms() if subject.kind == "attention" else [None]:
        for kind in KINDS:
            try:
                assert_near(subject.make(causal=causal), tokens() * 10, kind, run)
            except AssertionError as error:
                form = "" if causal is None else f", causal={causal}"
                raise AssertionError(f"{kind}{form}: {error}") from error


class Alone(nn.Module):
    """A part with the context that a model would pass."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return run(self.part, x)


def serves_every_length(part: Any, folder: Path, target: str = "onnx-cpu") -> None:
    """One graph, traced with few tokens, gives what the part gives at any number of them.

    Raises:
        AssertionError: it does not.
        MissingExtra: ONNX or ONNX Runtime is not installed.
    """
    from effformer.export import Session, export_onnx

    alone, axes = Alone(part), {"x": {0: "batch", 1: "tokens"}}
    inputs, path = torch.randn(2, 7, part.site.dim), folder / "part.onnx"
    report = export_onnx(alone, path, inputs, dynamic=axes, target=target, verify=False)
    session = Session(path, threads=1)
    most = getattr(getattr(part, "core", None), "tokens", part.site.length or max(LENGTHS))
    demand(report.conditions == (), f"the graph holds only where {report.conditions}")
    ends = {end for _, end in report.ranges.values()}
    demand(ends <= {None, most}, f"the graph serves up to {ends} tokens, the part {most}")
    for n in (n for n in LENGTHS if n <= most):
        x = torch.randn(3 if n > 7 else 1, n, part.site.dim)
        with torch.no_grad():
            expected = alone(x)
        found = torch.from_numpy(session.run({"x": x})["output"])
        assert_close(found, expected, rtol=1e-4, atol=1e-4, what=f"the graph on {n} tokens: ")


def one_graph_serves_every_length(subject: Subject) -> None:
    """It exports to ONNX, and ONNX Runtime gives what torch gives."""
    for causal in subject.forms() if subject.kind == "attention" else [None]:
        part = subject.make(causal=causal)
        if getattr(part, "order", None) is not None:
            continue  # permutations are constants of a graph, which serves their length
        with tempfile.TemporaryDirectory() as folder:
            serves_every_length(part, Path(folder))


def exports(part: Any, folder: Path, *, fixed: bool = False) -> None:
    """The graph of a part, which is built for one length or for any, agrees at other shapes.

    Raises:
        AssertionError: it does not.
        MissingExtra: ONNX or ONNX Runtime is not installed.
    """
    from effformer.export import export_onnx

    fixed = fixed or part.site.length is not None
    axes = {0: "batch"} if fixed else {0: "batch", 1: "tokens"}
    x = torch.randn(2, 11, part.site.dim)
    report = export_onnx(Alone(part), folder / "part.onnx", (x,), dynamic={"x": axes})
    parity = report.parity
    whole = parity is not None and len(parity.cases) >= 3 and parity.passed
    demand(whole, f"the graph differs from the part: {parity}")


def its_graph_agrees(subject: Subject) -> None:
    """It exports to ONNX, and ONNX Runtime gives what torch gives at other shapes, batch 1 included."""
    with tempfile.TemporaryDirectory() as folder:
        exports(subject.make(), Path(folder))


def _inputs(x: Tensor) -> dict[str, Any]:
    """What stands for real numbers (B, N, D) and is none."""
    return {
        "another width": torch.cat([x, x[..., :1]], -1), "a rank more": x[None], "a rank less": x[0],
        "a number": x.sum(), "whole numbers": x.long(), "bool": x > 0, "complex": x + 0j,
        "double": x.double(), "another device": x.to("meta"), "nothing": None, "a list": [1.0],
        "an array": x.detach().numpy(), "no samples": x[:0], "no tokens": x[:, :0],
    }  # fmt: skip


def part_calls(part: Any) -> Calls:
    """Wrong calls of a part, each with what is wrong."""
    x = tokens()
    ctx = context_for(part, x)
    for name, value in _inputs(x).items():
        yield name, lambda value=value: part(value, ctx)  # type: ignore[misc]
    yield "no arguments", lambda: part()
    yield "no context", lambda: part(x, None)
    masks = {
        "short": torch.ones(2, 10) > 0, "whole": torch.ones(2, 11).long(), "more": torch.ones(3, 11) > 0
    }  # fmt: skip
    for name, mask in masks.items():
        yield f"{name} mask", lambda mask=mask: part(x, replace(ctx, mask=mask))  # type: ignore[misc]
    grids: tuple[Any, ...] = ((3, 5), (-1, -11), (0, 0), ("a",), (1.5, 2.0))
    for grid in grids:
        yield f"grid {grid}", lambda grid=grid: part(x, replace(ctx, grid=grid))  # type: ignore[misc]
    for name, cond in {"wide": torch.randn(2, DIM + 1), "more": torch.randn(3, DIM)}.items():
        if ctx.cond is not None:
            yield f"{name} condition", lambda cond=cond: part(x, replace(ctx, cond=cond))  # type: ignore[misc]


def stream_calls(part: Any) -> Calls:
    """Wrong calls of a part that streams."""
    x = tokens()
    for batch in (-1, 1.5, None, "x"):
        yield f"batch {batch}", lambda batch=batch: part.init_state(batch, like=x)  # type: ignore[misc]
    yield "like nothing", lambda: part.init_state(2, like=None)
    state = part.init_state(2, like=x)
    for name, value in (_inputs(x) | {"more samples": torch.cat([x, x[:1]])}).items():
        yield f"step of {name}", lambda value=value: part.step(value, state)  # type: ignore[misc]
    for other in (None, x):
        yield f"state {type(other)}", lambda other=other: part.step(x, other)  # type: ignore[misc]


def _error(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        return e
    return None


def answers_or_refuses(calls: Calls) -> None:
    """Every wrong call is answered, or refused in a sentence; some are refused.

    Raises:
        AssertionError: Python or torch speak, or nothing is refused.
    """
    errors = {name: error for name, call in calls if (error := _error(call)) is not None}
    raw = [f"{name}: {error!r}" for name, error in errors.items() if not is_refusal(error)]
    demand(not raw, f"these are no sentences for a user: {'; '.join(raw)}")
    demand(len(errors) > 5, f"of the wrong calls only {', '.join(errors) or 'none'} are refused")


def what_does_not_fit_is_refused_in_a_sentence(subject: Subject) -> None:
    """Inputs of a wrong shape, type or device, and wrong states."""
    answers_or_refuses(part_calls(subject.make()))
    if subject.kind != "block" and subject.caps.streaming:
        causal = True if subject.kind == "attention" else None
        answers_or_refuses(stream_calls(subject.make(causal=causal)))


CHECKS: tuple[Check, ...] = (
    Check(macs_are_those_of_the_operators, lambda s: True),
    Check(
        half_precision_is_near_float64,
        lambda s: s.cond or s.kind != "block" or s.caps.cond == "never",
    ),
    Check(one_graph_serves_every_length, lambda s: s.kind == "attention"),
    Check(its_graph_agrees, lambda s: s.kind != "attention"),
    Check(what_does_not_fit_is_refused_in_a_sentence, lambda s: not s.caps.joint),
)
"""What is checked beside `effformer.testing.contract`, and whom it concerns."""
