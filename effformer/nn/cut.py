"""Smaller forms of a part that has only some of its units: heads, or hidden channels.

A form is an ordinary module of the same class. Its weights are tensors taken from those of the
whole part, gradients included, and not parameters of their own.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from effformer.context import Context

from .gates import values_known
from .onnx_nodes import gathers

__all__ = ["Cuttable", "Forms", "cut_linear", "put", "twin"]

M = TypeVar("M", bound=nn.Module)


class Cuttable(Protocol):
    """A part with ``caps.width``."""

    @property
    def units(self) -> int:
        """Number of units: heads, or hidden channels."""
        ...

    @property
    def cut(self) -> tuple[nn.Module, ...]:
        """The layers that `select` cuts."""
        ...

    def magnitudes(self) -> Tensor:
        """Norm of the weights before and behind each unit, (units,)."""
        ...

    def select(self, units: Tensor) -> Self:
        """The part with the units at these indices (int64, in this order) and no others."""
        ...


class Forms:
    """Runs a part under ``ctx.width``: by multiplying (training, compiled graphs), or on the smaller form
    that has the active units only.

    Samples with the same active units run together, whatever their number; in an ONNX graph all
    samples run together, on the units that some of them have. Forms are kept, the
    most recent ``limit`` of them, until a weight changes. Layers that are no plain matrices any more
    (quantized ones) are not cut; the part multiplies.

    Args:
        limit: largest number of forms that are kept.

    Attributes:
        finish: makes a form ready, for instance packs its weights; None: forms are used as they are
            cut.
    """

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self.finish: Callable[[nn.Module], nn.Module] | None = None
        self._kept: OrderedDict[tuple[bool, ...], nn.Module] = OrderedDict()
        self._weights: tuple[tuple[int, int], ...] = ()

    def run(self, part: nn.Module, x: Tensor, ctx: Context) -> Tensor:
        """The part on x (B, N, D)."""
        assert ctx.width is not None
        if part.training or ctx.tap is not None:
            return part(x, ctx)
        if not all(type(layer) is nn.Linear for layer in part.cut):  # type: ignore[union-attr]
            return part(x, ctx)
        if gathers() and ctx.packing is None and not getattr(part, "counts_units", False):
            return _cut_in_graph(part, x, ctx)
        if not values_known(ctx.width):
            return part(x, ctx)
        active, ctx = ctx.width > 0, replace(ctx, width=None)
        if bool((active == active[:1]).all()):
            return self.form(part, active[0])(x, ctx)
        if ctx.packing is not None:  # one row cannot be taken apart by samples
            return part(x, replace(ctx, width=active.to(x.dtype)))
        patterns, which = active.unique(dim=0, return_inverse=True)
        groups = [(which == i).nonzero().flatten() for i in range(len(patterns))]
        pieces = [
            self.form(part, pattern)(x.index_select(0, rows), ctx.rows(rows))
            for pattern, rows in zip(patterns, groups, strict=True)
        ]
        return torch.cat(pieces).index_select(0, torch.cat(groups).argsort())

    def form(self, part: Any, active: Tensor) -> nn.Module:
        """The form for active groups (U,) of equally many units; the part itself if all are."""
        key = tuple(active.tolist())
        if all(key) and self.finish is None:
            return part
        weights = tuple((w.data_ptr(), _version(w)) for w in _weights(part))
        if weights != self._weights:
            self._kept.clear()
            self._weights = weights
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return kept
        units = active.repeat_interleave(part.units // len(key)).nonzero().flatten()
        form: nn.Module = part.select(units)
        if self.finish is not None:
            form = self.finish(form)
        if not torch.is_grad_enabled() or not any(w.requires_grad for w in _weights(part)):
            self._kept[key] = form
            if len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        return form


def _cut_in_graph(part: Any, x: Tensor, ctx: Context) -> Tensor:
    """A part whose weights are gathered while the graph runs: those of units that are active for some
    sample; factors switch them off for the others.
    """
    assert ctx.width is not None
    each = part.units // ctx.width.shape[1]
    groups = (ctx.width > 0).any(dim=0).nonzero()
    units = (groups * each + torch.arange(each, device=x.device)).flatten()
    factors = ctx.width.repeat_interleave(each, dim=1).index_select(1, units)
    out: Tensor = part.select(units)(x, replace(ctx, width=factors))
    return out


def _weights(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()]


def _version(weight: Tensor) -> int:
    """Counts changes in place; tensors made in inference mode are not counted."""
    return 0 if weight.is_inference() else weight._version


def twin(module: M) -> M:
    """A shallow copy without hooks, whose children and values may be exchanged."""
    other = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            other.__dict__[name] = type(value)() if "hooks" in name else value.copy()
    return other


def put(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Replace a parameter of a `twin` by a tensor, which keeps its gradient."""
    module._parameters.pop(name, None)
    setattr(module, name, value)


def cut_linear(
    linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> nn.Linear:
    """A linear layer with some outputs (rows) or inputs (columns) of another."""
    small = twin(linear)
    weight, bias = linear.weight, linear.bias
    if rows is not None:
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.index_select(0, rows)  # type: ignore[assignment]
    if columns is not None:
        # a graph gathers whole rows of the transposed matrix, which is many times as fast
        turned = gathers()
        weight = (
            weight.t().index_select(0, columns).t() if turned else weight.index_select(1, columns)
        )
    put(small, "weight", weight)
    put(small, "bias", bias)
    small.out_features, small.in_features = weight.shape
    return small
