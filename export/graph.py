"""Facts about an ONNX file, and writing one so that what existed before survives any failure."""

from __future__ import annotations

import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from effformer.arguments import checked
from effformer.checks import FormatError, need
from effformer.files import alive, atomic_path, check_file, host, inside, mark

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "GRAPH",
    "PRODUCER",
    "GraphFacts",
    "ValueFacts",
    "load_graph",
    "read_graph",
    "write_graph",
]

T = TypeVar("T")

PRODUCER, GRAPH = "effformer", "graph"
_DATA = "weights of a graph"
SINGLE_FILE_LIMIT = 2_000_000_000
"""Bytes of weights above which they go to a second file: one protobuf message ends at 2 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueFacts:
    """An input or output of a graph.

    Attributes:
        name: its name.
        dtype: ONNX type, for instance "FLOAT".
        shape: lengths; symbols and expressions of symbols are strings, None is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """What an ONNX file holds.

    Attributes:
        path: the file.
        opset: version of the standard operators.
        domains: versions of the other operator sets in use.
        operators: number of nodes by operator, other domains as "domain::Operator"; most frequent
            first.
        inputs: inputs of the graph.
        outputs: outputs of the graph.
        weights: number of stored values.
        bytes: size of the file and of the file with its weights, if there is one.
        metadata: what the producer wrote, "effformer.*" by `export_onnx`.
    """

    path: Path
    opset: int
    domains: Mapping[str, int]
    operators: Mapping[str, int]
    inputs: tuple[ValueFacts, ...]
    outputs: tuple[ValueFacts, ...]
    weights: int
    bytes: int
    metadata: Mapping[str, str]

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return sum(self.operators.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {
            kind: [{"name": v.name, "dtype": v.dtype, "shape": list(v.shape)} for v in given]
            for kind, given in (("inputs", self.inputs), ("outputs", self.outputs))
        }
        return {
            "path": str(self.path), "opset": self.opset, "domains": dict(self.domains),
            "nodes": self.nodes,
            "operators": dict(self.operators), "weights": self.weights, "bytes": self.bytes,
            "metadata": dict(self.metadata), **values,
        }  # fmt: skip


@checked
def read_graph(path: str | Path) -> GraphFacts:
    """Read the facts of an ONNX file; weights are not loaded into memory.

    Raises:
        FormatError: missing, truncated or foreign file, or its file of weights is missing.
    """
    path = Path(path)
    model = load_graph(path)
    files = {path, *_weight_files(model, path)}
    if missing := sorted(str(f) for f in files if not f.is_file()):
        raise FormatError(f"{path}: its weights are in {missing[0]}, which is missing")
    kinds = Counter(
        f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.all_nodes()
    )
    return GraphFacts(
        path=path,
        opset=model.opset_imports.get("", 0),
        domains={d: v for d, v in model.opset_imports.items() if d},
        operators=dict(kinds.most_common()),
        inputs=tuple(map(_value_facts, model.graph.inputs)),
        outputs=tuple(map(_value_facts, model.graph.outputs)),
        weights=sum(_weights(model, "size")),
        bytes=sum(f.stat().st_size for f in files),
        metadata=dict(model.metadata_props),
    )


def load_graph(path: str | Path) -> onnx_ir.Model:
    """Load an ONNX file.

    Raises:
        FormatError: missing, truncated or foreign file, or one whose weights are said to lie outside
            its folder.
    """
    path, ir = Path(path), need("onnx_ir")
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    try:
        model: onnx_ir.Model = ir.load(path)
    except Exception as error:  # of the parser of whatever format the suffix names
        raise FormatError(f"{path}: is truncated or not an ONNX file") from error
    if not len(model.graph.outputs):
        raise FormatError(f"{path}: is truncated or not an ONNX file (a graph without outputs)")
    if outside := sorted(n for n in _locations(model) if inside(path.parent, n) is None):
        raise FormatError(
            f"{path}: its weights are said to lie in {outside[0]!r}, outside its folder, where nothing "
            "is read; put them beside the file and save it again"
        )
    return model


def write_graph(
    model: onnx_ir.Model,
    path: str | Path,
    check: Callable[[Path], T] | None = None,
    *,
    force: bool = False,
) -> T | None:
    """Write a model to a temporary place, check the file, and move it.

    Above `SINGLE_FILE_LIMIT` the weights go to ``<name>.<unique>.data`` beside it. That file is in
    place before the model is, and the one of a model of ours that stood here before is removed after
    it.

    Args:
        model: the model.
        path: where it goes: new, or an earlier graph of ours.
        check: called with the temporary file; what it raises leaves everything as it was.
        force: replace any file.

    Returns:
        The result of ``check``.

    Raises:
        FormatError: the place cannot be written, or holds something else.
    """
    ir = need("onnx_ir")
    target = check_file(path, GRAPH, force=force)
    data = f"{target.name}.{uuid.uuid4().hex[:8]}.data"
    large = sum(_weights(model, "nbytes")) > SINGLE_FILE_LIMIT
    model.producer_name, model.doc_string = PRODUCER, mark(GRAPH)
    with atomic_path(path, GRAPH, force=force) as temporary:
        ir.save(model, temporary, **({"external_data": data} if large else {}))
        if large:
            with temporary.with_name(data).open("ab") as file:  # behind the last tensor
                file.write(f"{mark(_DATA)} {host()} {os.getpid()}".encode())
        result = None if check is None else check(temporary)
        before = _own_data(target)
    for old in (*before, *_forgotten(target)):
        old.unlink(missing_ok=True)
    return result


def _own_data(path: Path) -> list[Path]:
    """The files of weights that `write_graph` wrote for the graph that is there, if it is ours."""
    try:
        model = load_graph(path)
    except FormatError:
        return []
    own = _data_name(path)
    files = (path.with_name(n) for n in _locations(model) if own.fullmatch(n))
    return [f for f in files if model.producer_name == PRODUCER and not f.is_symlink()]


def _forgotten(path: Path) -> list[Path]:
    """Files of weights of processes that were killed before the graph came to its place, or before
    they removed those of an older one.
    """
    own = _data_name(path)
    found = [f for f in path.parent.iterdir() if own.fullmatch(f.name) and not f.is_symlink()]
    dead = [f for f in found if _writer_is_dead(f)]
    try:
        used = _locations(load_graph(path)) if dead else set()
    except FormatError:
        return []
    return [f for f in dead if f.name not in used]


def _data_name(path: Path) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.data")


def _writer_is_dead(path: Path) -> bool:
    """Whether a file of weights was written by `write_graph`, in a process that is no more."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 100))
        found = re.search(rf"{mark(_DATA)} (\w+) (\d+)$".encode(), file.read())
    return found is not None and found[1].decode() == host() and not alive(int(found[2]))


def _weights(model: onnx_ir.Model, what: str) -> list[int]:
    values = model.graph.initializers.values()
    return [getattr(v.const_value, what) for v in values if v.const_value is not None]


def _weight_files(model: onnx_ir.Model, path: Path) -> set[Path]:
    return {path.parent / name for name in _locations(model)}


def _locations(model: onnx_ir.Model) -> set[str]:
    """The files in which a graph says that its tensors lie, those of constants and of graphs and
    functions inside it included.
    """
    external = need("onnx_ir").ExternalTensor
    return {str(t.location) for t in _tensors(model) if isinstance(t, external)}


def _tensors(model: onnx_ir.Model) -> Iterator[object]:
    for graph in (*model.graphs(), *model.functions.values()):
        yield from (v.const_value for v in getattr(graph, "initializers", {}).values())
        for node in graph:
            for attribute in node.attributes.values():
                value = getattr(attribute, "value", None)
                yield from value if isinstance(value, (list, tuple)) else (value,)


def _value_facts(value: onnx_ir.Value) -> ValueFacts:
    shape = () if value.shape is None else value.shape
    lengths = tuple(d if isinstance(d, int) else d.value for d in shape)
    return ValueFacts(
        name=str(value.name), dtype="" if value.dtype is None else value.dtype.name, shape=lengths
    )
