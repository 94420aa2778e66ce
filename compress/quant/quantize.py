"""Quantize a model: choose layers by path, pack their weights, report errors and bytes, replay on
load.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from effformer import registry
from effformer.arguments import checked
from effformer.calls import Call, Inputs, bind, check_parts, evaluating
from effformer.checks import FormatError
from effformer.config import Spec
from effformer.wrapped import unwrapping

from ..report import KeptLayer, PackedLayer, Report, file_bytes, relative_error
from ..samples import Data, calls
from ..transforms import forget, record
from ..where import Where, check, covers, patterns
from .calibrate import attempt
from .foreign import opened
from .linear import PackedWeight, QuantEmbedding, QuantLinear
from .mixed import Rule, decide, read_rules
from .plan import Packed, Planned, make_plan, pack
from .schemes import Scheme, make_scheme
from .smooth import Smoothed
from .swap import irreplaceable, swap

__all__ = [
    "SENSITIVE", "Done", "choose", "dequantize", "describe", "first_call", "float_outputs", "keep_record", "put_in", "quantize",
    "quantize_",
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)
Dense = nn.Linear | nn.Embedding
_KINDS = (nn.Linear, NonDynamicallyQuantizableLinear, nn.Embedding)

SENSITIVE: tuple[str, ...] = ("*label_embed*", "*y_embedder*", "*final*", "*head")
"""Layers that stay int8 when the others have fewer bits: label tables and the last layer.

Chosen by measurement on a trained class-conditional model: they take a sixth off the error of nf4
(5.8 % to 4.8 %). Time embeddings make no difference, and modulations (a third of a DiT's weights)
too little for their size (4.7 %).
"""


@checked
@unwrapping
def quantize(
    model: M,
    scheme: Spec,
    where: Where = "*",
    *,
    skip: Where = (),
    sensitive: Spec | None = "int8",
    backend: str = "torch",
    data: Data | None = None,
    inputs: Inputs | None = None,
) -> tuple[M, Report]:
    """A copy of a model with packed weights in its linear layers and embeddings, and a report.

    Args:
        model: any module.
        scheme: a name ("int8", "nf4", "gptq", ...: ``effformer list quantizers``), a dict with
            options ({"name": "int8", "block": 32}), or a Config. Schemes around another one name it
            ({"name": "rotate", "scheme": "gptq"}). Several by layer: a `MixedScheme`, written by hand or
            chosen by `Sensitivity.budget`, or its options ({"schemes": {"*.ffn": "int4", "*": "int8"}}).
        where: glob patterns of module paths; a match covers everything below it ("blocks.*.ffn").
        skip: patterns of layers that stay in floating point.
        sensitive: scheme of the layers in `SENSITIVE` if ``scheme`` is a single one of fewer than 8
            bits; None makes no exception.
        backend: "torch", "bitsandbytes" (same bytes, its kernels) or "auto"; sensitive layers are
            always decoded by torch.
        data: calibration data of the schemes that look at the inputs of layers: named tensors whose
            first axis counts samples, a data set, or batches of them; what `recording` has kept. Names
            that the model does not take are left out. Memory does not grow with their number.
        inputs: named tensors (or one tensor, or a tuple), to measure the relative error of all
            tensors that the model returns; None: the first batch of ``data``.

    Returns:
        The new model and what was done.

    Raises:
        ValueError: a pattern matches nothing, a chosen layer is already quantized or not finite, the
            model has no layer that can be quantized, or the data are missing, empty, not finite or do
            not fit the model.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())
        >>> small, report = quantize(model, "nf4", inputs=torch.ones(1, 64))
        >>> report.layers[0].scheme
        'nf4'
    """
    check_parts(model, where="quantize")
    options: dict[str, Any] = {"skip": skip, "sensitive": sensitive, "backend": backend}
    with _copied(model, scheme) as changed:
        report = quantize_(changed, scheme, where, **options, data=data, inputs=inputs)
    return changed, report


@contextmanager
def _copied(model: M, spec: Spec) -> Iterator[M]:
    """A copy to work on in the block, which until then reads the weights that may be packed from the model
    itself: most are never copied. Schemes that divide weights in front of a layer work on a whole copy.
    """
    rules, _ = read_rules(spec, sensitive=None, careful=(), backend="torch")
    folds = any(isinstance(rule.scheme, Smoothed) and rule.scheme.config.fold for rule in rules)
    dense = [m.weight for m in model.modules() if type(m) in _KINDS and not folds]
    lent: dict[int, Any] = {id(weight): weight for weight in dense}
    changed = copy.deepcopy(model, dict(lent))
    yield changed
    own: dict[int, Any] = {}
    for module in changed.modules():
        for name, value in module._parameters.items():
            if id(value) in lent:
                module._parameters[name] = copy.deepcopy(value, own)


@checked
@unwrapping
def quantize_(
    model: nn.Module,
    scheme: Spec,
    where: Where = "*",
    *,
    skip: Where = (),
    sensitive: Spec | None = "int8",
    backend: str = "torch",
    data: Data | None = None,
    inputs: Inputs | None = None,
) -> Report:
    """`quantize` in place; if it raises, the model is as it was."""
    check_parts(model, where="quantize")
    rules, named = read_rules(scheme, sensitive=sensitive, careful=SENSITIVE, backend=backend)
    before = file_bytes(model.state_dict())
    call, reference = None, None
    if data is not None:
        call, data = first_call(model, data)
        with evaluating(model):
            attempt(model, call, where="quantize: data: batch 0")
    if inputs is not None:
        call = bind(model, inputs, where="quantize")
    if call is not None:
        reference = float_outputs(model, call)
    done = put_in(model, rules, named, where, skip, data, call)
    keep_record(model, done.packed)
    error = None
    if reference is not None and call is not None:
        error = relative_error(float_outputs(model, call), reference)
    return done.report(before, file_bytes(model.state_dict()), error)


@dataclass(frozen=True, slots=True)
class Done:
    """Packed layers that stand in a model, which has no record of them yet.

    Attributes:
        plan: what became of which layer, by path.
        packed: the layers.
        kept: layers that stay.
    """

    plan: Mapping[str, Planned]
    packed: Mapping[str, Packed]
    kept: list[KeptLayer]

    def report(self, before: int, after: int, error: float | None) -> Report:
        """The report for these sizes of the file."""
        layers = [describe(name, self.plan[name], layer) for name, layer in self.packed.items()]
        return Report(
            layers=tuple(layers), kept=tuple(self.kept), output_error=error,
            bytes_before=before, bytes_after=after,
        )  # fmt: skip


def put_in(
    model: nn.Module,
    rules: Sequence[Rule],
    named: Sequence[str],
    where: Where,
    skip: Where,
    data: Data | None,
    call: Call | None,
) -> Done:
    """Pack layers in place, see `choose` and `pack`; if it raises, the model is as it was."""
    with opened(model):
        chosen, kept = choose(model, patterns(where), patterns(skip), rules, named)
        plan = make_plan(chosen, rules)
        packed = pack(model, plan, data, call)
        swap(model, {chosen[name]: layer for name, layer in packed.items()})
    return Done(plan, packed, kept)


def first_call(model: nn.Module, data: Data) -> tuple[Call, Data]:
    """The first batch as a call, and data that still hold it."""
    where = "quantize: data"
    if not isinstance(data, Iterator):
        return next(calls(model, data, where=where)), data
    head = list(itertools.islice(data, 1))
    return next(calls(model, head, where=where)), itertools.chain(head, data)


@checked
@unwrapping
def dequantize(model: M) -> M:
    """A copy with dense layers in place of packed ones; their weights are the rounded ones.

    Larger, and faster with few tokens per call, where decoding a weight costs more than using it.

    Raises:
        ValueError: nothing in the model is quantized.
    """
    changed = copy.deepcopy(model)
    packed = {m: m.to_dense() for m in changed.modules() if isinstance(m, Packed)}
    if not packed:
        raise ValueError("dequantize: no layer of this model is quantized")
    weights: dict[Tensor, Any] = {}
    for layer, dense in packed.items():
        dense.weight = weights.setdefault(layer.get_buffer("codes"), dense.weight)
    with opened(changed):
        swap(changed, packed)
    forget(changed, "quantize")
    return changed


@registry.transform.register("quantize")
def _replay(model: M, record: Mapping[str, Any]) -> M:
    """Packed weights in place of dense ones: ``scheme``, and the paths of the ``layers``."""
    layers = record.get("layers")
    if "scheme" not in record or not isinstance(layers, Sequence) or isinstance(layers, str):
        raise FormatError("transform 'quantize': expected a scheme and a list of layers")
    try:
        scheme = make_scheme(record["scheme"], where="transform 'quantize'")
    except (TypeError, ValueError) as error:
        raise FormatError(f"{error}; a newer effformer may have written it") from error
    with opened(model):
        swap(model, _empty(model, layers, scheme))
    return model


def _empty(model: nn.Module, layers: Sequence[str], scheme: Scheme) -> dict[nn.Module, Packed]:
    """Layers to load packed tensors into, for the dense ones at some paths."""
    modules = dict(model.named_modules())
    packed: dict[nn.Module, Packed] = {}
    tied: dict[Tensor, Packed] = {}
    for name in layers:
        dense = modules.get(name)
        if not isinstance(dense, nn.Linear | nn.Embedding):
            found = "missing" if dense is None else f"a {type(dense).__name__}"
            raise FormatError(
                f"transform 'quantize': layer {name!r} is {found}, expected a linear layer or table"
            )
        kind = QuantLinear if isinstance(dense, nn.Linear) else QuantEmbedding
        packed[dense] = kind.like(dense, scheme.config)  # type: ignore[arg-type]
        packed[dense].tie(tied.setdefault(dense.weight, packed[dense]))
    return packed


def choose(
    model: nn.Module,
    where: tuple[str, ...],
    skip: tuple[str, ...],
    rules: Sequence[Rule],
    named: Sequence[str] = (),
    *,
    verb: str = "quantize",
) -> tuple[dict[str, Dense], list[KeptLayer]]:
    """Layers to pack by path, and the layers with weights that stay.

    Args:
        model: the model, `opened`.
        where: patterns of layers to pack.
        skip: patterns of layers to leave.
        rules: what becomes of which.
        named: patterns in the scheme; like those of ``where`` and ``skip`` each must cover a layer.
        verb: for messages.
    """
    modules = {name: m for name, m in model.named_modules() if name}
    ready = {n: m for n, m in modules.items() if type(m) in _KINDS}
    able = {n: m for n, m in ready.items() if irreplaceable(m) is None}
    done = [n for n, m in modules.items() if isinstance(m, PackedWeight)]
    if not able and not done:
        raise ValueError(
            f"{verb}: {type(model).__name__} has no linear layer or embedding below it; "
            "nothing to pack"
        )
    known, what = (*able, *done), "linear layer or embedding"
    for option, given in (("where", where), ("skip", skip), ("schemes", tuple(named))):
        check(given, modules, able=known, what=what, where=f"{verb}: {option}")

    def wanted(name: str) -> bool:
        rule = decide(rules, [name])
        return rule is not None and rule.scheme is not None and covers(where, name)

    if again := [n for n in done if wanted(n) and not covers(skip, n)]:
        raise ValueError(
            f"{verb}: {again[0]!r} and {len(again) - 1} more are already quantized; "
            "leave them out with where= or skip=, or start from the dense model"
        )
    chosen = {n: m for n, m in able.items() if wanted(n) and not covers(skip, n)}
    if not chosen and any(rule.scheme is not None for rule in rules):
        raise ValueError(f"{verb}: skip={list(skip)} leaves nothing of where={list(where)}")
    return chosen, _kept(modules, chosen, able, where, skip)


def _kept(
    modules: Mapping[str, nn.Module],
    chosen: Mapping[str, nn.Module],
    able: Mapping[str, nn.Module],
    where: tuple[str, ...],
    skip: tuple[str, ...],
) -> list[KeptLayer]:
    """Every other layer that has a weight of two or more dimensions of its own."""
    out = []
    for name, module in modules.items():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if name in chosen or not any(t.dim() >= 2 for t in own):
            continue
        kind = type(module).__name__
        if isinstance(module, PackedWeight):
            reason = f"already {module.scheme.name}"
        elif name in able:
            outside = "the scheme names none for it" if covers(where, name) else "outside where"
            reason = f"matches skip={list(skip)}" if covers(skip, name) else outside
        elif type(module) in _KINDS:
            reason = irreplaceable(module) or ""
        else:
            reason = f"{kind} is not a linear layer or embedding"
        size = sum(t.numel() * t.element_size() for t in own)
        out.append(KeptLayer(name=name, kind=kind, bytes=size, reason=reason))
    return out


def describe(name: str, one: Planned, packed: Packed) -> PackedLayer:
    """What became of a layer."""
    weight = one.weight
    return PackedLayer(
        name=name,
        scheme=one.label,
        shape=tuple(weight.shape),
        error=relative_error([packed.weight], [weight]),
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=sum(t.numel() * t.element_size() for t in packed.tensors().values()),
    )


def keep_record(model: nn.Module, packed: Mapping[str, Packed]) -> None:
    """Write to ``model.transforms`` what is packed, from which loading repeats it."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, layer in packed.items():
        config = layer.scheme.config.to_dict()
        groups.setdefault(repr(config), (config, []))[1].append(name)
    for config, names in groups.values():
        record(model, "quantize", {"scheme": config, "layers": names})


def float_outputs(model: nn.Module, call: Call, *, where: str | None = None) -> list[Tensor]:
    """What a model returns for a call, in evaluation mode.

    Args:
        model: the model.
        call: what it is given.
        where: of calibration data: the verb, its argument and the batch, for messages.

    Raises:
        TypeError: nothing of it is a floating-point tensor.
        ValueError: the call does not fit the model.
    """
    with evaluating(model):
        found = call.run(model) if where is None else attempt(model, call, where=where)
    # copied: a model may return a buffer that its next call writes into
    if floats := [x.clone() for x in found if x.is_floating_point()]:
        return floats
    raise TypeError(f"quantize: {type(model).__name__} returns no floating-point tensor to compare")
