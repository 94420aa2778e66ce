"""Weights that are packed while they are read: a model larger than the memory, small enough when it is packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from effformer.arguments import checked
from effformer.calls import check_parts
from effformer.config import Spec
from effformer.layout import Layout, StateDict
from effformer.lazy import values
from effformer.loading import fill, matched, tensors_of
from effformer.weights import open_weights
from effformer.wrapped import unwrapping

from ..report import PackedLayer, Report, file_bytes
from ..where import Where, patterns
from .mixed import Rule, read_rules
from .plan import Dense, Packed, make_plan, pack
from .quantize import SENSITIVE, choose, describe, keep_record
from .swap import swap

__all__ = ["load_quantized"]


@checked
@unwrapping
def load_quantized(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    scheme: Spec,
    where: Where = "*",
    *,
    skip: Where = (),
    sensitive: Spec | None = "int8",
    backend: str = "torch",
    layout: str | Layout = "auto",
    weights: str = "auto",
    config: Any = None,
) -> Report:
    """`effformer.load_weights` and `quantize` in one, layer by layer: the dense model never exists, and beside
    what is packed one layer at a time is in memory.

    Args:
        model: a model of dense layers, which becomes the packed one; best built on the meta device (``with
            torch.device("meta")``), where it takes no memory.
        source: see `effformer.load_weights`; safetensors files, alone or in shards with an index, are read
            layer by layer, torch files whole.
        scheme: see `quantize`; formats that look at the inputs of layers cannot serve.
        where: glob patterns of layers, see `quantize`.
        skip: patterns of layers that stay in floating point.
        sensitive: see `quantize`.
        backend: see `quantize`.
        layout: layout of the source.
        weights: which of several weights.
        config: options of the checkpoint's model.

    Returns:
        What was done.

    Raises:
        FormatError: the source cannot be read, or does not fit the model.
        ValueError: a pattern matches nothing, a weight is not finite, or the scheme wants calibration data.

    Example:
        >>> with torch.device("meta"):
        ...     model = effformer.build_model("flux-tiny")  # or "flux-dev"
        >>> load_quantized(model, "flux/model.safetensors.index.json", "nf4")  # doctest: +SKIP
    """
    check_parts(model, where="load_quantized")
    rules, named = read_rules(scheme, sensitive=sensitive, careful=SENSITIVE, backend=backend)
    chosen, kept = choose(
        model, patterns(where), patterns(skip), rules, named, verb="load_quantized"
    )
    _check_wants(chosen, rules)
    file = open_weights(source, weights, config, tensors_of(model), lazy=True)
    found = matched(model, file, layout, strict=True, keep=())
    before = file_bytes(model.state_dict())
    packed: dict[str, Packed] = {}
    layers: list[PackedLayer] = []
    for group in _groups(chosen):
        with _filled(group, found.state):
            plan = make_plan(group, rules)
            made = pack(model, plan, None, None)
            layers += [describe(name, plan[name], layer) for name, layer in made.items()]
        packed |= made
    swap(model, {chosen[name]: layer for name, layer in packed.items()})
    done = {f"{name}.{kind}" for name in packed for kind in ("weight", "bias")}
    rest = {key: x for key, x in found.state.items() if key not in done}
    fill(model, rest, where=file.where)
    if found.trained:
        model.trained = found.trained
    keep_record(model, packed)
    return Report(
        layers=tuple(layers), kept=tuple(kept), output_error=None, bytes_before=before,
        bytes_after=file_bytes(model.state_dict()),
    )  # fmt: skip


def _check_wants(chosen: Mapping[str, Dense], rules: Sequence[Rule]) -> None:
    """Refuse formats that look at the inputs of layers: there is no model yet that could be run."""
    for one in make_plan(chosen, rules).values():
        if one.wants:
            raise ValueError(
                f"load_quantized: scheme {one.scheme.name!r} looks at the inputs of layers, which there are none "
                "of while weights are read; take a scheme such as 'hqq' that needs none, or quantize the loaded "
                "model"
            )


def _groups(chosen: Mapping[str, Dense]) -> Iterator[dict[str, Dense]]:
    """Layers that share a weight, together."""
    groups: dict[int, dict[str, Dense]] = {}
    for name, dense in chosen.items():
        groups.setdefault(id(dense.weight), {})[name] = dense
    yield from groups.values()


@contextmanager
def _filled(group: Mapping[str, Dense], state: StateDict) -> Iterator[None]:
    """Layers with the values of a file, for the time of the block."""
    before = {dense: dict(dense._parameters) for dense in group.values()}
    made: dict[int, nn.Parameter] = {}
    try:
        for name, dense in group.items():
            for kind, old in before[dense].items():
                if old is None or id(old) in made:
                    continue
                key = f"{name}.{kind}"
                if key not in state:  # the file has a tied weight once
                    key = next(f"{n}.{kind}" for n in group if f"{n}.{kind}" in state)
                value = values(state[key]).to(old.dtype)
                made[id(old)] = nn.Parameter(value, old.requires_grad)
        for dense, empty in before.items():
            filled = {kind: None if p is None else made[id(p)] for kind, p in empty.items()}
            dense._parameters.update(filled)
        yield
    finally:
        for dense, empty in before.items():
            dense._parameters.update(empty)
