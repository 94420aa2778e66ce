"""Compare a count with fvcore and with torch's counter, and explain every difference."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from effformer.calls import Call
from effformer.checks import need

from .attribution import Costs
from .fake import on_fake, on_real

__all__ = ["Explanation", "Row", "compare_counters"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """One reason why another counter differs.

    Attributes:
        reason: words.
        macs: what the reason contributes to (their total - our total).
    """

    reason: str
    macs: int


@dataclass(frozen=True, slots=True)
class Row:
    """One other counter.

    Attributes:
        counter: its name.
        total: its total in MACs, None if it failed.
        difference: its total minus ours.
        explanations: reasons with numbers; they and ``unexplained`` add up to ``difference``.
        unexplained: what no reason covers; anything but 0 means that one of the two counters is
            wrong.
        error: why it failed, empty if it did not.
    """

    counter: str
    total: int | None
    difference: int = 0
    explanations: tuple[Explanation, ...] = ()
    unexplained: int = 0
    error: str = ""

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.counter}: failed ({self.error})"
        lines = [f"{self.counter}: {self.total:,} MACs, {self.difference:+,} against ours"]
        lines += [f"  {e.macs:+,}  {e.reason}" for e in self.explanations]
        if self.unexplained:
            lines.append(f"  {self.unexplained:+,}  UNEXPLAINED")
        return "\n".join(lines)


def compare_counters(model: nn.Module, inputs: Call, costs: Costs) -> tuple[Row, ...]:
    """Rows for torch's ``FlopCounterMode`` and fvcore's ``FlopCountAnalysis``.

    Args:
        model: the module, in evaluation mode; fvcore really runs it.
        inputs: its arguments.
        costs: our count of the same call.
    """
    return _torch_row(model, inputs, costs), _fvcore_row(model, inputs, costs)


def _row(counter: str, theirs: int, ours: int, reasons: Mapping[str, int]) -> Row:
    explanations = tuple(Explanation(reason, n) for reason, n in reasons.items() if n)
    left = theirs - ours - sum(e.macs for e in explanations)
    return Row(counter, theirs, theirs - ours, explanations, left)


def _formula_reasons(costs: Costs) -> dict[str, int]:
    return {
        f"{op.removeprefix('formula: ')}: counted by operators, not by its closed formula": -n
        for op, n in costs.by_op().items()
        if op.startswith("formula: ")
    }


def _torch_row(model: nn.Module, inputs: Call, costs: Costs) -> Row:
    name = "torch FlopCounterMode"
    theirs = FlopCounterMode(display=False)
    try:
        with on_fake(model, inputs) as run, torch.no_grad(), theirs:
            run.call()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return Row(name, None, error=f"{type(error).__name__}: {error}".split("\n")[0])
    known = {getattr(op, "_qualified_op_name", str(op)) for op in flop_registry}
    reasons = _formula_reasons(costs)
    for op, n in costs.by_op().items():
        if op not in known and not op.startswith("formula: "):
            reasons[f"{op}: no formula in torch's table"] = -n
    return _row(name, theirs.get_total_flops() // 2, costs.total, reasons)


def _fvcore_row(model: nn.Module, inputs: Call, costs: Costs) -> Row:
    name = "fvcore FlopCountAnalysis"
    if any(p.is_meta for p in model.parameters()):
        return Row(name, None, error="needs real parameters, the model is on the meta device")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.jit warns that it is old, and of every branch
            theirs, reasons, missing = _fvcore_total(model, on_real(model, inputs).inputs)
    except (RuntimeError, NotImplementedError, TypeError, AssertionError, IndexError) as error:
        return Row(name, None, error=f"{type(error).__name__}: {error}".split("\n")[0])
    for op, n in costs.by_op().items():
        if op in missing:
            reasons[f"{op}: fvcore does not support it and counts 0"] = -n
    return _row(name, theirs, costs.total, _formula_reasons(costs) | reasons)


def _fvcore_total(model: nn.Module, inputs: Call) -> tuple[int, dict[str, int], set[str]]:
    """Its total, the differences that its trace explains, and the operators that it lacks."""
    reasons: dict[str, int] = {}
    handles = _fvcore_handles(reasons)
    named = {k: v for k, v in inputs.kwargs.items() if isinstance(v, Tensor)}
    fixed = {k: v for k, v in inputs.kwargs.items() if k not in named}
    positional = _Positional(model, len(inputs.args), tuple(named), fixed)
    given = (*inputs.args, *named.values())
    analysis = need("fvcore.nn").FlopCountAnalysis(positional, given)
    analysis.set_op_handle(**handles)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return int(analysis.total()), reasons, set(analysis.unsupported_ops())


def _fvcore_handles(reasons: dict[str, int]) -> dict[str, Any]:
    """Handles that count as fvcore does and note where its way differs from ours."""
    handles = need("fvcore.nn.jit_handles")

    def note(reason: str, n: int) -> None:
        reasons[reason] = reasons.get(reason, 0) + int(n)

    def extra(text: str, original: Any) -> Any:
        def handle(inputs: list[Any], outputs: list[Any]) -> int:
            count = int(original(inputs, outputs))
            note(text, count)
            return count

        return handle

    def attention(inputs: list[Any], outputs: list[Any]) -> int:
        q, k, v = (handles.get_shape(x) for x in inputs[:3])
        missed = prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
        note("scaled_dot_product_attention: fvcore does not support it and counts 0", -missed)
        return 0

    def einsum(inputs: list[Any], outputs: list[Any]) -> int:
        shapes = [handles.get_shape(x) for x in inputs[1].node().inputs()]
        count = int(handles.einsum_flop_jit(inputs, outputs))
        exact = _einsum(inputs[0].toIValue(), shapes)
        if exact:
            note("einsum: fvcore reads numpy's printed cost, four digits", count - exact)
        else:
            note("einsum without a product: fvcore counts half an operation per element", count)
        return count

    norm = handles.norm_flop_counter
    own: dict[str, Any] = {
        "aten::scaled_dot_product_attention": attention,
        "aten::einsum": einsum,
        "aten::layer_norm": extra(
            "layer_norm: fvcore counts 4 per element, 5 with a scale", norm(2)
        ),
        "aten::group_norm": extra(
            "group_norm: fvcore counts 4 per element, 5 with a scale", norm(2)
        ),
        "aten::instance_norm": extra(
            "instance_norm: fvcore counts 4 per element, 5 with a scale", norm(1)
        ),
        "aten::batch_norm": extra(
            "batch_norm: fvcore counts 1 per element, 2 with a scale", handles.batchnorm_flop_jit
        ),
    }
    for op, scales in _ELEMENTWISE.items():
        original = handles.elementwise_flop_counter(*scales)
        own[f"aten::{op}"] = extra(f"{op}: fvcore counts elementwise work", original)
    return own


_ELEMENTWISE = {
    "adaptive_avg_pool2d": (1, 0),
    "upsample_nearest2d": (0, 1),
    "upsample_bilinear2d": (0, 4),
    "grid_sampler": (0, 4),
}
"""fvcore's elementwise operators with its factors of input and output elements."""


def _einsum(equation: str, shapes: list[list[int]]) -> int:
    """Exact multiply-adds of an einsum by the products that torch makes of it."""
    with FlopCounterMode(display=False) as exact:
        torch.einsum(equation, *(torch.empty(shape, device="meta") for shape in shapes))
    return exact.get_total_flops() // 2


class _Positional(nn.Module):
    """A model called with tensors only, as the tracer wants it."""

    def __init__(
        self, model: nn.Module, positional: int, names: tuple[str, ...], fixed: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model, self.positional, self.names, self.fixed = model, positional, names, fixed

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, tensors[self.positional :], strict=True))
        out = self.model(*tensors[: self.positional], **named, **self.fixed)
        return tuple(x for x in tree_leaves(out) if isinstance(x, Tensor))
