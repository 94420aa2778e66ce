"""Any module to ONNX: traced by torch.export, written atomically, verified against torch."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from effformer.arguments import checked
from effformer.calls import Call, Inputs, check_parts, evaluating
from effformer.checks import CapabilityError, need
from effformer.files import check_file
from effformer.flow.conventions import trained_of
from effformer.nn.onnx_nodes import capturing_for
from effformer.notebook import Shown
from effformer.values import Positive
from effformer.version import VERSION
from effformer.wrapped import unwrapping

from .boxes import name_by_module
from .conditions import Held, ends_of, holds, where_it_holds, without
from .graph import GRAPH, PRODUCER, GraphFacts, read_graph, write_graph
from .guards import guard, guard_ids
from .inputs import Axes, as_it_was, changes, graph_call, resolve_axes, rewritten, sizes, traceable
from .lengths import Ranges
from .packed import decodes_codes, kernels_for, translations
from .runs import least_lengths, other_sides, unequal_axes
from .targets import get_target
from .terms import keep_small_terms
from .verify import CONDITIONS, RANGES, TRACED, VerifyReport, verify_onnx

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["IN_FLOATS", "ExportError", "ExportReport", "export_onnx"]

_CONSTANT = re.compile(
    r"marked L\['(\w+)'\]\.size\(\)\[(\d+)\] as dynamic but your code specialized it to be a "
    r"constant \((\d+)\)"
)
IN_FLOATS = (
    "export it after model.float(), or save it so for the command line: "
    "effformer.save_pretrained(effformer.load_model(FOLDER).float(), NEW)"
)
_log = logging.getLogger(__name__)


class ExportError(ValueError):
    """A module cannot be written as a graph; the message says where it stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport(Shown):
    """What `export_onnx` wrote.

    Attributes:
        path: the file.
        graph: its facts.
        parity: the comparison with torch, None if it was not wanted.
        seconds: time that it took.
        ranges: symbol -> least and largest length that the tracer holds the graph for, where it
            does not hold it for all (None: any).
        conditions: what else the tracer took for granted about lengths, such as
            ``height % 4 == 0``; elsewhere the graph refuses to run.
    """

    path: Path
    graph: GraphFacts
    parity: VerifyReport | None
    seconds: float
    ranges: Ranges = field(default_factory=dict)
    conditions: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": str(self.path), "seconds": round(self.seconds, 3),
            "graph": self.graph.to_dict(),
            "parity": None if self.parity is None else self.parity.to_dict(),
            "ranges": {s: list(r) for s, r in self.ranges.items()},
            "conditions": list(self.conditions),
        }  # fmt: skip


@checked
@unwrapping
def export_onnx(
    model: nn.Module,
    path: str | Path,
    inputs: Inputs | None = None,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | str | None = "auto",
    opset: int | None = None,
    target: str = "onnx-cpu",
    verify: bool = True,
    tolerance: Positive = 1e-4,
    accuracy_level: Literal[0, 1, 2, 3, 4] = 0,
    output_names: Sequence[str] | None = None,
    force: bool = False,
) -> ExportReport:
    """Write a module as an ONNX graph.

    Layers quantized by `effformer.compress` keep their packed weights: row formats ("int8", "int4",
    "gptq", ...) become MatMulNBits on targets that have it, nf4 and fp4 MatMulBnb4 on
    ``"onnx-cpu-small"``; other formats are decoded in the graph, once, when it is loaded. So a packed
    model with ``target="onnx"`` takes the memory and time of float32.

    Where the trace does not hold, and at lengths that the model refuses, the graph refuses to run: a
    node named "refused: height must be a multiple of 2" fails. Symbols that several inputs share
    have one length.

    Args:
        model: any module; it and its train/eval state are left as they were. The graph is that of
            eval mode.
        path: the file: new, or an earlier graph of ours. What stood there before is replaced only
            after everything, verification included, went well.
        inputs: example inputs: a tensor, a tuple, a dict of keyword arguments, or None for the
            model's own. Arguments that are no tensors are fixed in the graph.
        dynamic: "auto" (``model.dynamic_axes()``, else axis 0 of every tensor is "batch"), None
            (every length is fixed), or input name -> axis -> symbol; equal symbols have equal
            lengths.
        opset: version of the standard operators, None for the target's (20 on CPUs).
        target: name of a registered target.
        verify: compare ONNX Runtime with torch at the example and three other shapes, see
            `verify_onnx`.
        tolerance: largest accepted relative difference.
        accuracy_level: of MatMulNBits: 0 computes in float32; 4 rounds activations to 8 bits, which
            is faster with kernels for it and outside the default tolerance.
        output_names: names of the outputs; by default "output", or "output_0", "output_1", ...
        force: replace any file.

    Raises:
        ExportError: the module cannot be traced or translated.
        VerificationError: the graph does not compute what the module computes.
        ValueError: ``dynamic`` does not fit the inputs, the graph does not fit the target, or an
            unknown target.
        TypeError: the inputs do not fit the module.
        FormatError: the file cannot be written, or is something else.

    Example:
        >>> import torch, tempfile
        >>> from effformer.export import export_onnx
        >>> path = tempfile.mkdtemp() + "/m.onnx"
        >>> report = export_onnx(torch.nn.Linear(4, 2), path, torch.randn(1, 4))
        >>> report.graph.inputs[0].shape, report.parity.max_rel < 1e-4
        (('batch', 4), True)
    """
    started, runtime = time.perf_counter(), get_target(target)
    version = runtime.opset if opset is None else opset
    if not 18 <= version <= runtime.newest:
        raise ValueError(
            f"export_onnx: target {target!r} takes opsets 18 to {runtime.newest}, got {version}"
        )
    check_file(path, GRAPH, force=force)
    check_parts(model, where="export_onnx")
    call = graph_call(model, inputs, where="export_onnx")
    _check_numbers(model, call)
    axes = resolve_axes(model, call, dynamic, where="export_onnx")
    call = traceable(call, axes)
    kernels = (runtime.kernels, accuracy_level)
    with evaluating(model):
        with as_it_was(model):
            changed = rewritten(model, call)  # inputs that do not fit fail with their own message
        if changed:
            raise ExportError(
                f"export_onnx: {type(model).__name__} changes its buffer {changed[0]!r} whenever it "
                "runs, and a graph keeps nothing from one run to the next; choices: take the state "
                "as an input and return the new one"
            )
        with capturing_for(runtime.domains), as_it_was(model):
            program, held = _trace_anew(model, call, axes, version, kernels)
        _name(program, call, axes, output_names)
        _stamp(program.model, model, call, axes)
        if verify:
            held = _settled(program.model, model, call, axes, held, tolerance)
        ranges, conditions = _guarded(program.model, model, call, axes, held)

    def check(file: Path) -> VerifyReport | None:
        if problems := runtime.problems(read_graph(file)):
            raise ValueError(f"export_onnx: target {target!r}: {'; '.join(problems)}")
        if not verify:
            return None
        report = verify_onnx(file, model, call.kwargs or call.args, tolerance=tolerance)
        return replace(report, path=Path(path))

    parity = write_graph(program.model, path, check, force=force)
    if parity is not None and parity.constant:
        _log.warning("%s: the model's output is constant, so its agreement proves little", path)
    seconds = time.perf_counter() - started
    return ExportReport(
        path=Path(path), graph=read_graph(path), parity=parity, seconds=seconds, ranges=ranges,
        conditions=conditions,
    )  # fmt: skip


def _check_numbers(model: nn.Module, call: Call) -> None:
    """Refuse bfloat16, which neither the convolutions of our opsets nor ONNX Runtime on CPUs take."""
    numbers = (*model.parameters(), *model.buffers(), *call.tensors.values())
    if any(x.dtype == torch.bfloat16 for x in numbers):
        raise ExportError(
            f"export_onnx: {type(model).__name__} computes in bfloat16, which ONNX Runtime does not on CPUs; "
            f"{IN_FLOATS}"
        )


def _trace_anew(
    model: nn.Module, call: Call, axes: Axes, opset: int, kernels: tuple[tuple[str, ...], int]
) -> tuple[torch.onnx.ONNXProgram, Held]:
    """`_trace` of the model as it is; and only if that fails, of the model after a run, for there
    are caches that a graph cannot fill. Their length then is the end of a range.
    """
    try:
        with as_it_was(model):
            return _trace(model, call, axes, opset, kernels)
    except ExportError as error:
        try:
            caches = changes(model, call)
        except CapabilityError:  # an operator that the target has not
            caches = False
        if not caches:
            raise error from error.__cause__
        return _trace(model, call, axes, opset, kernels)


def _trace(
    model: nn.Module, call: Call, axes: Axes, opset: int, kernels: tuple[tuple[str, ...], int]
) -> tuple[torch.onnx.ONNXProgram, Held]:
    """The graph, and where the tracer holds it."""
    need("onnxscript")
    dim = torch.export.Dim
    given = tuple(call.arguments)
    shapes = {n: {a: dim.DYNAMIC for a in axes[n]} if n in axes else None for n in given}
    name = type(model).__name__
    with warnings.catch_warnings(), torch.no_grad(), kernels_for(model, *kernels) as packed:
        warnings.simplefilter("ignore")  # about the exporter's own insides
        try:
            program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes)
        except Exception as error:
            why = _frozen(error, axes) or _reason(error)
            raise ExportError(f"export_onnx: {name} cannot be traced: {why}") from error
        try:
            made = torch.onnx.export(
                program, opset_version=opset, dynamo=True, verbose=False,
                custom_translation_table=translations(), optimize=False,
            )  # fmt: skip
        except Exception as error:
            raise ExportError(
                f"export_onnx: {name} cannot be translated to opset {opset}: {_reason(error)}"
            ) from error
        assert made is not None
        keep_small_terms(made.model.graph)
        if packed:
            need("onnxscript.optimizer").optimize_ir(made.model, should_fold=decodes_codes)
        else:
            made.optimize()
    return made, where_it_holds(program, call, axes)


def _settled(
    graph: onnx_ir.Model, model: nn.Module, call: Call, axes: Axes, held: Held, tolerance: float
) -> Held:
    """What the tracer took for granted, without that on whose other side the model runs and the
    graph gives the same.

    Raises:
        VerificationError: the graph gives something else there.
    """
    taken = [*ends_of(held[0]), *held[1]]
    draws = torch.Generator().manual_seed(0)
    if next(other_sides(model, call, axes, taken, draws), None) is None:
        return held
    _say(graph, held)
    inputs = call.kwargs or call.args
    with tempfile.TemporaryDirectory(prefix="effformer.") as folder:
        report = write_graph(
            graph, Path(folder) / "plain.onnx",
            lambda file: verify_onnx(file, model, inputs, tolerance=tolerance),
        )  # fmt: skip
    assert report is not None
    seen = [
        dict(zip(report.lengths, some, strict=True))
        for some in zip(*report.lengths.values(), strict=True)
    ]
    return without(held, [c for c in taken if any(holds(c, some) is False for some in seen)])


def _guarded(graph: onnx_ir.Model, model: nn.Module, call: Call, axes: Axes, held: Held) -> Held:
    """Let the graph refuse what the trace does not hold for, and lengths that the model refuses."""
    draws = torch.Generator().manual_seed(0)
    ranges, conditions = held
    known = [*ends_of(ranges), *conditions]
    least = least_lengths(model, call, axes, known, draws)
    guard_ids(graph)
    guard(graph, axes, [*known, *least], unequal_axes(model, call, axes, draws))
    conditions += least
    _say(graph, (ranges, conditions))
    return ranges, conditions


def _say(graph: onnx_ir.Model, held: Held) -> None:
    """Write down where the graph holds."""
    graph.metadata_props[RANGES] = json.dumps(held[0])
    graph.metadata_props[CONDITIONS] = json.dumps(held[1])


def _frozen(error: BaseException, axes: Axes) -> str:
    """What would work where the trace made a constant of a length, "" for other errors."""
    found = _CONSTANT.search(str(error))
    symbol = axes.get(found[1], {}).get(int(found[2])) if found else None
    if found is None or symbol is None:
        return ""
    return (
        f"its graph serves {found[3]} {symbol!r} only (axis {found[2]} of {found[1]!r}); choices: "
        f"leave that axis out of 'dynamic', and export one graph for every number of {symbol!r}"
    )


def _reason(error: BaseException) -> str:
    """The first lines of the error at the root; torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:500] or type(error).__name__


def _name(
    program: torch.onnx.ONNXProgram, call: Call, axes: Axes, output_names: Sequence[str] | None
) -> None:
    """Give inputs, outputs and symbols the user's names in place of the tracer's."""
    graph = program.model.graph
    if len(graph.inputs) != len(call.tensors):
        found = [str(v.name) for v in graph.inputs]
        raise ExportError(f"export_onnx: the graph takes {found}, given were {list(call.tensors)}")
    count = len(graph.outputs)
    outputs = output_names or (["output"] if count == 1 else [f"output_{i}" for i in range(count)])
    if len(outputs) != count:
        raise ValueError(f"export_onnx: {len(outputs)} output_names for {count} outputs")
    if len({*outputs, *call.tensors}) < count + len(call.tensors) or not all(
        name.isprintable() and name for name in outputs
    ):
        raise ValueError(
            f"export_onnx: output_names must be words that differ from each other and from the inputs "
            f"{list(call.tensors)}, got {list(outputs)}"
        )
    symbols: dict[str | onnx_ir.SymbolicDim, str] = {}
    for value, name in zip(graph.inputs, call.tensors, strict=True):
        for axis, symbol in axes.get(name, {}).items():
            symbols.setdefault(str(value.shape[axis]), symbol)
    names = (*call.tensors, *outputs)
    for value in (v for node in graph.all_nodes() for v in node.outputs):
        if value.name in names:
            value.name = f"{value.name}__inner"
    for value, name in zip((*graph.inputs, *graph.outputs), names, strict=True):
        value.name = name
    program.rename_axes(symbols)


def _stamp(graph: onnx_ir.Model, model: nn.Module, call: Call, axes: Axes) -> None:
    """Say where the graph comes from, and in the names of its nodes from which modules; drop the tracer's
    notes, which hold stack traces and local paths.
    """
    name_by_module(graph, model)
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    values = (*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values())
    for value in (*values, *(v for n in graph.graph.all_nodes() for v in n.outputs)):
        value.metadata_props.clear()
    graph.producer_name, graph.producer_version = PRODUCER, VERSION
    facts = {
        "effformer.version": VERSION,
        "effformer.model": str(getattr(model, "name", type(model).__name__)),
        TRACED: json.dumps(sizes(call, axes)),
    }
    if (record := trained_of(model)) is not None:
        facts["effformer.trained"] = json.dumps(record.to_dict())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        facts["effformer.config"] = json.dumps(config.to_dict())
    graph.graph.metadata_props.clear()
    graph.metadata_props.clear()
    graph.metadata_props.update(facts)
