"""`sensitivity`: every layer in every format alone, and what that does to the output of the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.calls import Call, bind, check_parts, evaluating
from effformer.config import Spec
from effformer.profile import interleave, machine
from effformer.values import Times
from effformer.weights import once
from effformer.wrapped import unwrapping

from ..quant.calibrate import Seen, attempt, observe
from ..quant.foreign import opened
from ..quant.mixed import Rule
from ..quant.plan import Dense, Packed, Planned, make_plan
from ..quant.quantize import choose, float_outputs
from ..quant.schemes import Scheme, make_scheme
from ..quant.swap import carry, standing_in
from ..report import file_bytes
from ..samples import Data, calls
from ..where import Where, patterns
from .distance import Distance
from .result import Sensitivity, SensitivityRow

__all__ = ["sensitivity"]

Progress = Callable[[int, int], None]
"""(candidates done, candidates in all)."""


_Input = tuple[tuple[int, ...], torch.dtype]


@dataclass(slots=True)
class _Unit:
    """Layers of one module that read one tensor, or share a weight: they get one format.

    Attributes:
        layers: by path.
        given: shape and type of what each layer is given, once for every call in a forward.
    """

    layers: dict[str, Dense] = field(default_factory=dict)
    given: dict[nn.Module, list[_Input]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        first, *more = self.layers
        return "+".join([first, *(path.rpartition(".")[2] for path in more)])

    @property
    def bytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in self.weights)

    @property
    def weights(self) -> list[Tensor]:
        return list({id(m.weight): m.weight for m in self.layers.values()}.values())


@dataclass(slots=True)
class _Candidate:
    """A unit in one format, and how far the output was from that of the dense model so far."""

    unit: _Unit
    label: str
    packed: dict[nn.Module, Packed]
    distance: Distance = field(default_factory=Distance)


@checked
@unwrapping
def sensitivity(
    model: nn.Module,
    schemes: Sequence[Spec] = ("int8", "int4"),
    where: Where = "*",
    *,
    skip: Where = (),
    data: Data | None = None,
    runs: Times = 5,
    progress: Progress | None = None,
) -> Sensitivity:
    """Change one layer at a time, in every format, and measure the output of the model and the layer's time.

    For a dense output y and an output y' with one layer rounded:
    ``mse = |y' - y|^2 / |y|^2`` over all samples, ``cosine`` the mean over the samples of y.y' / |y| |y'|,
    ``kl`` the mean of KL(softmax(y) || softmax(y')) over the last axis of outputs (B, C) and (B, N, C).
    Layers of one module that read the same tensor (queries, keys, values; gate and up), and those that
    share a weight, are one unit.

    The model runs over the data a few times for every unit and format; candidates are packed group by
    group, of at most a quarter of the model, so that memory grows neither with the number of layers nor
    with that of samples. Afterwards the very modules stand in the model that stood there before.

    Args:
        model: any module; it stays as it is.
        schemes: formats to try: names, dicts or Configs, see `quantize`.
        where: glob patterns of module paths to look at.
        skip: patterns of those to leave out.
        data: named tensors whose first axis counts samples, a data set or batches of such; None: the
            model's own example inputs, which say little about trained weights.
        runs: timed calls of every layer, alone, on inputs of the shape that it has seen; layers of one
            shape are timed once.
        progress: called after every candidate.

    Raises:
        ValueError: a pattern matches nothing, formats of one name, data that are empty, not finite or do
            not fit the model, or a layer that is already quantized.

    Example:
        >>> import torch
        >>> from effformer.compress import quantize, sensitivity
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
        >>> found = sensitivity(net, ["int8", "int4"], data={"input": torch.randn(16, 64)})
        >>> small, report = quantize(net, found.budget(bits=6))
        >>> report.ratio < 0.3
        True

    Reference: HAWQ-V3, 2021, arXiv 2011.10680 (errors of layers added up, formats chosen under a budget).
    """
    check_parts(model, where="sensitivity")
    made = _labelled(schemes)
    given = _given(model, data)
    with opened(model):
        anything = [Rule("*", next(iter(made.values())), "torch")]
        chosen, _ = choose(model, patterns(where), patterns(skip), anything, verb="sensitivity")
        first = next(iter(_calls(model, given)))
        units = _units(model, chosen, first)
        rows: list[SensitivityRow] = []
        times, whole = _Times(runs), file_bytes(model.state_dict())
        for group in _groups(units, whole):
            candidates = list(_candidates(model, group, made, given))
            samples = _compare(model, candidates, given)
            for one in candidates:
                rows.append(_row(one, times.of(one), whole))
                if progress is not None:
                    progress(len(rows), len(units) * len(made))
    return Sensitivity(
        rows=tuple(rows), schemes={label: s.config.to_dict() for label, s in made.items()},
        file_bytes=whole, samples=samples, machine=str(machine()),
    )  # fmt: skip


def _labelled(schemes: Sequence[Spec]) -> dict[str, Scheme]:
    """Schemes by the name under which the result shows them: options that are not the default's too."""
    found: dict[str, Scheme] = {}
    for spec in schemes:
        scheme = make_scheme(spec, where="sensitivity: schemes")
        plain = make_scheme(scheme.name).config.to_dict() if isinstance(spec, Mapping) else {}
        own = scheme.config.to_dict()
        changed = [f"{key}={value}" for key, value in own.items() if plain and plain[key] != value]
        label = " ".join([scheme.name, *changed])
        if label in found:
            raise ValueError(f"sensitivity: schemes: {label!r} is given twice")
        found[label] = scheme
    if not found:
        raise ValueError("sensitivity: schemes is empty; give at least one, such as 'int8'")
    return found


def _given(model: nn.Module, data: Data | None) -> Any:
    """Data that can be read several times; a stream is kept."""
    if data is None:
        return [bind(model, None, where="sensitivity", batch=2)]
    return list(data) if isinstance(data, Iterator) else data


def _calls(model: nn.Module, data: Any) -> Iterator[Call]:
    return calls(model, data, where="sensitivity: data")


def _units(model: nn.Module, chosen: Mapping[str, Dense], call: Call) -> list[_Unit]:
    """The layers together that are changed together, and what they are given in a call."""
    paths = {dense: path for path, dense in chosen.items()}
    units: dict[Dense, _Unit] = {}
    by_weight: dict[int, _Unit] = {}
    last: dict[str, tuple[Any, _Unit]] = {}  # of a parent: what a layer was given, its unit

    def unit_of(dense: Dense) -> _Unit:
        if dense not in units:
            units[dense] = by_weight.setdefault(id(dense.weight), _Unit())
            units[dense].layers[paths[dense]] = dense
        return units[dense]

    def hook(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else named["input"]
        parent = paths[module].rpartition(".")[0]
        given, with_it = last.get(parent, (lambda: None, None))
        if module not in units and with_it is not None and given() is x:
            by_weight.setdefault(id(module.weight), with_it)
        unit = unit_of(module)
        last[parent] = weakref.ref(x), unit
        unit.given.setdefault(module, []).append((tuple(x.shape), x.dtype))

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in paths]
    try:
        with evaluating(model):
            attempt(model, call, where="sensitivity: data: batch 0")
    finally:
        for handle in handles:
            handle.remove()
    ordered = dict.fromkeys(id(unit_of(dense)) for dense in chosen.values())
    known = {id(unit): unit for unit in units.values()}
    return [known[key] for key in ordered]


def _groups(units: Sequence[_Unit], whole: int) -> Iterator[list[_Unit]]:
    """Units whose dense weights together are at most a quarter of the model."""
    group: list[_Unit] = []
    for unit in units:
        if group and sum(u.bytes for u in group) + unit.bytes > whole // 4:
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


def _candidates(
    model: nn.Module, group: Sequence[_Unit], schemes: Mapping[str, Scheme], data: Any
) -> Iterator[_Candidate]:
    """The units of a group in every format."""
    plans: list[tuple[_Unit, str, dict[str, Planned]]] = [
        (unit, label, make_plan(unit.layers, [Rule("*", scheme, "torch")]))
        for unit in group
        for label, scheme in schemes.items()
    ]
    wants: dict[nn.Module, set[Any]] = {}
    for _, _, plan in plans:
        for one in plan.values():
            if one.wants:
                wants.setdefault(one.dense, set()).update(one.wants)
    seen: dict[nn.Module, Seen | None] = {}
    if wants:
        sorted_wants = {layer: tuple(sorted(some)) for layer, some in wants.items()}
        for found in observe(
            model, [[layer] for layer in wants], sorted_wants, data, where="sensitivity: data"
        ):
            seen |= found
    for unit, label, plan in plans:
        packed: dict[nn.Module, Packed] = {}
        for one in plan.values():
            packed[one.dense] = one.packed(seen.get(one.dense) if one.wants else None)
            carry(one.dense, packed[one.dense])
            if one.first != one.name:
                packed[one.dense].tie(packed[plan[one.first].dense])
        yield _Candidate(unit, label, packed)


def _compare(model: nn.Module, candidates: Iterable[_Candidate], data: Any) -> int:
    """Run the model with each candidate beside the dense one; the number of samples."""
    samples = 0
    for index, call in enumerate(_calls(model, data)):
        dense = float_outputs(model, call, where=f"sensitivity: data: batch {index}")
        samples += next((len(x) for x in call.leaves if x.dim()), 1)
        for one in candidates:
            with standing_in(model, one.packed):
                one.distance.add(dense, float_outputs(model, call))
    return samples


class _Times:
    """Seconds of a forward that layers take, dense and packed; those of one shape are timed once."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.dense: dict[Any, float] = {}
        self.known: dict[Any, tuple[float, float]] = {}

    def of(self, one: _Candidate) -> tuple[float, float] | None:
        """Seconds before and after, None for layers that are not called."""
        every = [
            self._measured(dense, packed, one.label, given)
            for dense, packed in one.packed.items()
            for given in one.unit.given.get(dense, ())
        ]
        if not every:
            return None
        return sum(before for before, _ in every), sum(after for _, after in every)

    def _measured(
        self, dense: nn.Module, packed: Packed, label: str, given: _Input
    ) -> tuple[float, float]:
        layer = (type(dense), packed.shape, given)
        key = (layer, label)
        if key not in self.known:
            x = torch.ones(given[0], dtype=given[1], device=packed.get_buffer("codes").device)
            x = x - 1 if isinstance(dense, nn.Embedding) else x
            found = interleave(
                {"dense": lambda: dense(x), "packed": lambda: packed(x)}, warmup=1, runs=self.runs
            )
            before = self.dense.setdefault(layer, found.rows["dense"].median)
            self.known[key] = before, found.ratios["packed"] * before
        return self.known[key]


def _row(one: _Candidate, times: tuple[float, float] | None, whole: int) -> SensitivityRow:
    dense = {f"{path}.weight": layer.weight for path, layer in one.unit.layers.items()}
    packed = {
        f"{path}.{name}": tensor
        for path, layer in one.unit.layers.items()
        for name, tensor in one.packed[layer].tensors().items()
    }
    size = sum(t.numel() * t.element_size() for t in once(packed).values())
    grown = _file_bytes(packed, whole) - _file_bytes(dense, whole)
    before, after = (None, None) if times is None else times
    return SensitivityRow(
        name=one.unit.name, layers=tuple(one.unit.layers), scheme=one.label,
        params=sum(w.numel() for w in one.unit.weights), bytes_before=one.unit.bytes,
        bytes_after=size, header=grown - (size - one.unit.bytes),
        mse=one.distance.mse, cosine=one.distance.cosine, kl=one.distance.kl,
        seconds_before=before, seconds_after=after,
    )  # fmt: skip


def _file_bytes(tensors: Mapping[str, Tensor], whole: int) -> int:
    """Bytes that tensors take at the end of a file of some size, in which their places are long numbers."""
    return file_bytes({"": torch.empty(whole, dtype=torch.uint8, device="meta"), **tensors})
