"""What becomes of every chosen layer: its format, its statistics, and what is folded around it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from effformer.calls import Call

from ..samples import Data
from .calibrate import Seen, Want, observe
from .fold import Point, points
from .linear import QuantEmbedding, QuantLinear
from .mixed import Rule, decide
from .schemes import Scheme
from .smooth import Smoothed
from .swap import carry

__all__ = ["Packed", "Planned", "make_plan", "pack"]

Dense = nn.Linear | nn.Embedding
Packed = QuantLinear | QuantEmbedding


@dataclass(frozen=True, slots=True)
class Planned:
    """What becomes of a layer.

    Attributes:
        name: its path.
        dense: the layer.
        scheme: its format.
        backend: who rounds and decodes.
        first: path of the first layer with the same weight.
        scale: factor (K,) of the weight whose inverse is folded into what makes the inputs.
    """

    name: str
    dense: Dense
    scheme: Scheme
    backend: str
    first: str
    scale: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight that is rounded."""
        weight = self.dense.weight.detach()
        return weight if self.scale is None else weight * self.scale.to(weight)

    def restored(self) -> Dense:
        """The dense layer, with its weight times the factor that is folded into what makes its inputs."""
        if self.scale is None:
            return self.dense
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(self.weight, requires_grad=self.dense.weight.requires_grad)
        layer.register_parameter("bias", self.dense.bias)  # type: ignore[arg-type]
        carry(self.dense, layer)
        return layer

    @property
    def label(self) -> str:
        """What the report calls the scheme."""
        return self.scheme.name if self.scale is None else f"{self.scheme.name}, folded"

    @property
    def wants(self) -> tuple[Want, ...]:
        """Statistics of its inputs that the format reads."""
        return self.scheme.wants if isinstance(self.dense, nn.Linear) else ()

    def packed(self, seen: Seen | None) -> Packed:
        """The layer in its format."""
        scheme: Any = self.scheme
        config, weight = scheme.config, self.weight
        if self.scale is not None and seen is not None:  # what remains is the inner scheme
            seen, config = seen.scaled(self.scale), scheme.inner.config
            weight = scheme.weight_for(weight, seen)
        kind = QuantLinear if isinstance(self.dense, nn.Linear) else QuantEmbedding
        made: Packed = kind.like(self.dense, config, backend=self.backend)  # type: ignore[arg-type]
        made.pack(weight, where=f"{self.name}.weight", seen=seen)
        if isinstance(made, QuantLinear):
            made.register_parameter("bias", self.dense.bias)  # type: ignore[arg-type]
        return made


def make_plan(chosen: Mapping[str, Dense], rules: Sequence[Rule]) -> dict[str, Planned]:
    """Formats by path; layers that share a weight share its format. Layers for which no rule has one
    are left out.

    Args:
        chosen: layers by path.
        rules: what becomes of which; the first that covers a layer, or one with the same weight, decides.
    """
    plan = {}
    for name, dense in chosen.items():
        tied = [n for n, other in chosen.items() if other.weight is dense.weight]
        rule = decide(rules, tied)
        if rule is None or rule.scheme is None:
            continue
        used = rule.scheme
        if any(isinstance(chosen[n], nn.Embedding) for n in tied):
            used = used.of_table()
        plan[name] = Planned(name, dense, used, rule.backend, tied[0])
    return plan


def pack(
    model: nn.Module, plan: dict[str, Planned], data: Data | None, call: Call | None
) -> dict[str, Packed]:
    """The packed layers, and, in place, what is folded into norms and modulations; undone on an error.

    Args:
        model: the model.
        plan: its layers; those whose factor is folded are written anew.
        data: calibration data.
        call: inputs to look for places to fold with.

    Raises:
        ValueError: schemes that want data get none, or such that cannot be used.
    """
    asking: dict[nn.Module, Planned] = {one.dense: one for one in plan.values() if one.wants}
    if asking and data is None:
        name = next(iter(asking.values())).scheme.name
        raise ValueError(
            f"quantize: scheme {name!r} looks at the inputs of layers, but there are no calibration "
            "data; give data=, a dict of named tensors or batches of them, or take a scheme such as "
            "'hqq' that needs none"
        )
    found = _folds(model, asking, call)
    makers = {layer for point in found for layer in point.makers}
    made = {
        n: one.packed(None) for n, one in plan.items() if not one.wants and one.dense not in makers
    }
    late: dict[str, Seen | None] = {n: None for n, one in plan.items() if one.dense in makers}
    scales: dict[Point, Tensor] = {}
    if data is not None and asking:
        wants = {dense: one.wants for dense, one in asking.items()}
        for group in observe(model, _units(asking, found), wants, data, where="quantize: data"):
            scales |= _scales(found, asking, plan, group)
            for dense, seen in group.items():
                one = plan[asking[dense].name]
                if one.name in late:  # its rows are divided first
                    late[one.name] = seen
                else:
                    made[one.name] = one.packed(seen)
    with _undone(scales):
        for point, scale in scales.items():
            point.divide(scale)
        made |= {name: plan[name].packed(seen) for name, seen in late.items()}
    for one in plan.values():
        if one.first != one.name:
            made[one.name].tie(made[one.first])
    return {name: made[name] for name in plan}


def _folds(model: nn.Module, asking: Mapping[nn.Module, Planned], call: Call | None) -> list[Point]:
    """Places whose readers all have the same scheme, which can be folded."""
    able = {
        dense: one.scheme for dense, one in asking.items()
        if isinstance(one.scheme, Smoothed) and one.scheme.config.fold
    }  # fmt: skip
    if not able or call is None:
        return []
    return [
        point for point in points(model, call)
        if len({able.get(reader) for reader in point.readers}) == 1 and point.readers[0] in able
    ]  # fmt: skip


def _units(asking: Mapping[nn.Module, Planned], found: list[Point]) -> Iterator[list[nn.Module]]:
    """Layers in their order; readers of one place together."""
    together: dict[nn.Module, list[nn.Module]] = {
        reader: [*point.readers] for point in found for reader in point.readers
    }
    for dense in asking:
        unit = together.get(dense, [dense])
        if unit[0] is dense:
            yield unit


def _scales(
    found: list[Point],
    asking: Mapping[nn.Module, Planned],
    plan: dict[str, Planned],
    group: Mapping[nn.Module, Seen | None],
) -> dict[Point, Tensor]:
    """Factors of the places whose readers are in a group; their plans are written anew."""
    scales = {}
    for point in found:
        seen = group.get(point.readers[0])
        if seen is None:
            continue
        scheme: Any = asking[point.readers[0]].scheme
        stacked = torch.cat([reader.weight.detach() for reader in point.readers])
        scales[point] = scheme.scale(stacked, seen)
        for reader in point.readers:
            name = asking[reader].name
            plan[name] = replace(plan[name], scale=scales[point])
    return scales


@contextmanager
def _undone(changed: Collection[Point]) -> Iterator[None]:
    """Give parameters of what makes some points their values back if the block raises."""
    before = {p: p.detach().clone() for point in changed for p in point.parameters}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)
        raise
