"""Graphs by the modules they come from: names of nodes, and what every module costs and loses in them."""

from __future__ import annotations

import ast
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from effformer.arguments import checked
from effformer.calls import Inputs
from effformer.checks import need
from effformer.profile.attribution import ancestors
from effformer.profile.breakdown import Box, Breakdown, Side, Watched, joined, sampled, ways
from effformer.values import Times
from effformer.wrapped import unwrapping

from .graph import SINGLE_FILE_LIMIT, read_graph
from .inputs import graph_call
from .session import Session

if TYPE_CHECKING:
    import onnx
    import onnx_ir

__all__ = ["graph_breakdown", "name_by_module"]

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Key of the tracer's note on a node that lists the modules around it, and its operator."""


def name_by_module(graph: onnx_ir.Model, model: nn.Module) -> None:
    """Put the path of the module of a model that a node of a fresh trace comes from before its name:
    ``blocks.0.attn.part.qkv/node_MatMul_105``.
    """
    modules = {name for name, _ in model.named_modules()}
    for node in graph.graph.all_nodes():
        if (path := _origin(node)) and path in modules:
            node.name = f"{path}/{node.name}"


def _origin(node: onnx_ir.Node) -> str:
    """Path of the module of a node, "" for the model itself. What an optimizer has put in belongs to
    where its input comes from.
    """
    while _SCOPES not in node.metadata_props:
        before = next((p for x in node.inputs if x is not None and (p := x.producer())), None)
        if before is None:
            return ""
        node = before
    *modules, _ = ast.literal_eval(node.metadata_props[_SCOPES])
    return str(modules[-1]) if modules else ""


@checked
@unwrapping
def graph_breakdown(
    path: str | Path, model: nn.Module, inputs: Inputs | None = None, *, runs: Times = 5
) -> Breakdown:
    """A model and a graph that was exported from it, module by module; see
    `effformer.profile.breakdown`.

    Times in the graph are those of its nodes in ONNX Runtime; what that has fused across modules counts
    for the model as a whole. Errors are those of the last value that leaves a module, where it has the
    shape of the module's output. Graphs whose weights lie in a second file are not compared inside.

    Args:
        path: the graph, quantized or not.
        model: what it was exported from.
        inputs: as for `export_onnx`.
        runs: timed runs of each, after one that is not.

    Raises:
        FormatError: not an ONNX file that ONNX Runtime loads.
        ValueError: the graph takes other inputs.
        TypeError: inputs that the model does not accept.

    Example:
        >>> import torch, tempfile
        >>> from effformer.export import export_onnx, graph_breakdown
        >>> path, model = tempfile.mkdtemp() + "/m.onnx", torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> report = export_onnx(model, path, torch.ones(1, 4))
        >>> graph_breakdown(path, model, torch.ones(1, 4)).boxes["0"][1].bytes
        40
    """
    facts = read_graph(path)
    call = graph_call(model, inputs, where="graph_breakdown")
    feed = {name: x.detach().cpu() for name, x in call.tensors.items()}
    proto = need("onnx").load(path)
    modules = {name for name, _ in model.named_modules()}
    with tempfile.TemporaryDirectory(prefix="effformer.") as folder:
        watched, timed = Watched(model, call, "torch"), _Timed(Path(path), Path(folder))
        with watched:
            for _ in range(1 + runs):
                watched.run()
                timed.run(feed)
            side = watched.side()
        spent = timed.seconds(modules)
        given = {}
        if facts.bytes < SINGLE_FILE_LIMIT:
            given = _values(proto, modules, feed, Path(folder) / "open.onnx")
    held = _bytes(proto, modules)
    boxes = {
        path: Box(kind=box.kind, macs=box.macs, bytes=held.get(path, 0), seconds=spent.get(path))
        for path, box in side.boxes.items()
        if path in held or path in spent
    }
    return joined([side, Side("onnx", boxes, given)], ways(runs))


def _module(name: str, modules: set[str]) -> str:
    """The module whose path stands before the name of a node, "" if there is none."""
    path, slash, _ = name.partition("/")
    return path if slash and path in modules else ""


def _bytes(proto: onnx.ModelProto, modules: set[str]) -> dict[str, int]:
    """Bytes of stored tensors by the module that they are named after, or whose node takes them first, and
    those around it.
    """
    taken: dict[str, str] = {}
    for node in proto.graph.node:
        for name in node.input:
            taken.setdefault(name, _module(node.name, modules))
    sizes = need("onnx_ir")
    found: dict[str, int] = defaultdict(int)
    for tensor in proto.graph.initializer:
        own, dot, _ = tensor.name.rpartition(".")
        home = own if dot and own in modules else taken.get(tensor.name, "")
        for path in ancestors(home):
            found[path] += sizes.from_proto(tensor).nbytes
    return found


class _Timed:
    """A graph in a session that writes down how long its nodes take."""

    def __init__(self, path: Path, folder: Path) -> None:
        ort = need("onnxruntime")
        options = ort.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "times")
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
        self.plain = Session(path)  # says what is wrong with the file or the inputs
        self._session = ort.InferenceSession(str(path), options)

    def run(self, feed: Mapping[str, Any]) -> None:
        """One run."""
        if not self.plain.inputs:
            return
        arrays = {name: feed[name].numpy() for name in self.plain.inputs}
        self._session.run(None, arrays)

    def seconds(self, modules: set[str]) -> dict[str, float]:
        """Median time of every module over all runs but the first."""
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        whole = [e for e in events if e.get("name") == "model_run"][1:]
        found: dict[str, list[float]] = {"": [1e-6 * run["dur"] for run in whole]}
        for i, run in enumerate(whole):
            end = run["ts"] + run["dur"]
            for e in events:
                if e.get("cat") == "Node" and run["ts"] <= e["ts"] <= end:
                    for path in ancestors(_module(e["name"], modules))[:-1]:
                        found.setdefault(path, [0.0] * len(whole))[i] += 1e-6 * e["dur"]
        return {path: median(runs) for path, runs in found.items()}


def _values(
    proto: onnx.ModelProto, modules: set[str], feed: Mapping[str, Any], place: Path
) -> dict[str, Any]:
    """What every module gives in the graph, as far as it can be told."""
    onnx = need("onnx")
    ends = dict(_ends(proto, modules))
    there = {value.name for value in proto.graph.output}
    for name in dict.fromkeys(ends.values()):
        if name not in there:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save(proto, place)
    made = Session(place).run(feed)
    floats = {name: torch.from_numpy(x) for name, x in made.items() if x.dtype.kind == "f"}
    return {path: sampled(floats[name]) for path, name in ends.items() if name in floats}


def _ends(proto: onnx.ModelProto, modules: set[str]) -> Iterator[tuple[str, str]]:
    """Modules, and the last value of each that is taken outside of it."""
    nodes = proto.graph.node
    home = [ancestors(_module(node.name, modules)) for node in nodes]
    takers: dict[str, list[list[str]]] = defaultdict(list)
    for node, paths in zip(nodes, home, strict=True):
        for name in node.input:
            takers[name].append(paths)
    for value in proto.graph.output:
        takers[value.name].append([])
    last: dict[str, str] = {}
    for node, paths in zip(nodes, home, strict=True):
        for path in paths:
            for name in node.output:
                if any(path not in others for others in takers[name]):
                    last[path] = name
    yield from last.items()
