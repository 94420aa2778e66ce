"""`quantize_within`: quantize, and put layers back until a metric of the user keeps its limit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from effformer.arguments import checked
from effformer.calls import check_parts, evaluating
from effformer.config import Spec
from effformer.values import NonNegative
from effformer.wrapped import unwrapping

from ..report import KeptLayer, file_bytes
from ..samples import Data
from ..where import Where
from .control import ControlReport, Goal, control, number
from .foreign import opened
from .mixed import read_rules
from .quantize import SENSITIVE, Done, first_call, keep_record, put_in
from .swap import place, standing_in

__all__ = ["quantize_within"]

M = TypeVar("M", bound=nn.Module)
Metric = Callable[[nn.Module], Any]
"""A number for a model, which is in evaluation mode; gradients are off."""


@checked
@unwrapping
def quantize_within(
    model: M,
    scheme: Spec,
    metric: Metric,
    where: Where = "*",
    *,
    max_drop: NonNegative = 0.01,
    relative: bool = False,
    best: Literal["high", "low"] = "high",
    quick: Metric | None = None,
    skip: Where = (),
    sensitive: Spec | None = "int8",
    data: Data | None = None,
) -> tuple[M, ControlReport]:
    """`quantize`, and then put layers back into floating point until a metric keeps its limit.

    Layers are ranked by what each regains alone and go back in this order, each measured with those
    before it, until ``drop <= max_drop``. With all of them back it is the dense model, so that there is
    always an answer. Ranking n layers takes n measurements.

    Args:
        model: any module.
        scheme: as in `quantize`.
        metric: of a model, a number: accuracy, a negative loss, agreement with the dense model, ...
        where: glob patterns of module paths to quantize.
        max_drop: by how much the metric may be worse than that of the dense model.
        relative: ``max_drop`` is a share of the dense model's metric.
        best: "high": large values are good; "low": small ones, as of a loss.
        quick: a cheaper metric, on fewer samples, by which layers are ranked; None: the same.
        skip: patterns of layers that stay in floating point.
        sensitive: as in `quantize`.
        data: calibration data of the schemes that look at the inputs of layers.

    Returns:
        The new model; and the log of all measurements, what was put back and why.

    Raises:
        ValueError: as in `quantize`; a metric that is no finite number for the dense model, or 0 where
            the drop is a share of it.
        TypeError: a metric that is no number.

    Example:
        >>> import torch
        >>> from effformer.compress import quantize_within
        >>> net, x = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)), torch.randn(9, 64)
        >>> wanted = net(x).argmax(1)
        >>> agreement = lambda m: (m(x).argmax(1) == wanted).float().mean()
        >>> small, report = quantize_within(net, "int4", agreement, max_drop=0.0)
        >>> report.drop
        0.0
    """
    check_parts(model, where="quantize_within")
    rules, named = read_rules(scheme, sensitive=sensitive, careful=SENSITIVE, backend="torch")
    changed = copy.deepcopy(model)
    goal = Goal(
        reference=number(_value(metric, changed)), max_drop=max_drop, relative=relative, best=best
    )
    before, call = file_bytes(changed.state_dict()), None
    if data is not None:
        call, data = first_call(changed, data)
    done = put_in(changed, rules, named, where, skip, data, call)
    dense = {layer: done.plan[name].restored() for name, layer in done.packed.items()}
    units: dict[str, list[str]] = {}
    for name in done.packed:
        units.setdefault(done.plan[name].first, []).append(name)

    def measured(by: Metric) -> Callable[[Collection[str]], Any]:
        def measure(back: Collection[str]) -> Any:
            layers = [done.packed[name] for unit in back for name in units[unit]]
            with standing_in(changed, {layer: dense[layer] for layer in layers}):
                return _value(by, changed)

        return measure

    found = control(
        list(units), measured(metric), goal, quick=None if quick is None else measured(quick)
    )
    back = [name for one in found.back for name in units[one.name]]
    with opened(changed):
        place(changed, {done.packed[name]: dense[done.packed[name]] for name in back})
    left = _left(done, back)
    keep_record(changed, left.packed)
    report = left.report(before, file_bytes(changed.state_dict()), None)
    return changed, replace(found, quantized=report)


def _value(metric: Metric, model: nn.Module) -> Any:
    with evaluating(model), torch.no_grad():
        return metric(model)


def _left(done: Done, back: Collection[str]) -> Done:
    """What is still packed; the rest counts as kept."""
    packed = {name: layer for name, layer in done.packed.items() if name not in back}
    kept = [*done.kept]
    for name in back:
        one = done.plan[name]
        kept.append(
            KeptLayer(
                name=name, kind=type(one.dense).__name__, reason="put back: the metric fell too far",
                bytes=one.weight.numel() * one.weight.element_size(),
            )
        )  # fmt: skip
    return Done(done.plan, packed, kept)
