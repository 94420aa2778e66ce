from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnx_ir
import pytest
from effformer.export import ExportReport, Session, graph, read_graph
from effformer.export.targets import get_target

from effformer import registry
from effformer.checks import FormatError


def test_files_that_are_no_graphs(exported: ExportReport, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        read_graph(tmp_path / "none.onnx")
    whole = exported.path.read_bytes()
    for name, content in (
        ("empty", b""),
        ("truncated", whole[: len(whole) // 2]),
        ("foreign", b"\x89PNG\r\n\x1a\n" + bytes(100)),
        ("text", b"hello"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match="truncated or not an ONNX file"):
            read_graph(tmp_path / name)


def test_facts_as_json(exported: ExportReport) -> None:
    data = read_graph(exported.path).to_dict()
    assert data["nodes"] == sum(data["operators"].values())
    assert data["inputs"] == [{"name": "x", "dtype": "FLOAT", "shape": ["batch", 5, 32]}]


def test_targets_are_registered(exported: ExportReport) -> None:
    assert {"onnx", "onnx-cpu"} <= set(registry.target.names())
    assert get_target("onnxruntime").opset == 20
    assert get_target("onnx").problems(exported.graph) == []


def test_external_weights_above_the_limit(
    exported: ExportReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(graph, "SINGLE_FILE_LIMIT", 1000)
    model, path = graph.load_graph(exported.path), tmp_path / "m.onnx"
    for _ in range(2):
        graph.write_graph(model, path)
        files = sorted(f.name for f in tmp_path.iterdir())
        assert len(files) == 2  # the weights of the first time are gone
        assert files[1].endswith(".data")
    assert read_graph(path).bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert Session(path).outputs == ("output",)
    (tmp_path / files[1]).unlink()
    with pytest.raises(FormatError, match="which is missing"):
        read_graph(path)


@pytest.mark.skipif(os.name == "nt", reason="asks whether a process lives as POSIX does")
def test_weights_that_killed_processes_left_are_removed(
    exported: ExportReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(graph, "SINGLE_FILE_LIMIT", 1000)
    model, path = graph.load_graph(exported.path), tmp_path / "m.onnx"
    graph.write_graph(model, path)
    (own,) = tmp_path.glob("*.data")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    written = own.read_bytes()
    pid = str(os.getpid()).encode()
    assert written.endswith(pid)
    left = written.removesuffix(pid) + str(dead.pid).encode()
    contents = {
        "m.onnx.00000000.data": left,
        "m.onnx.11111111.data": written,  # of a process that lives
        "m.onnx.22222222.data": b"mine",
        "n.onnx.33333333.data": left,
        "m.onnx.notes.data": left,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    graph.write_graph(model, path)
    assert Session(path).outputs == ("output",)
    assert not own.exists()
    kept = {f.name for f in tmp_path.iterdir()} & contents.keys()
    assert kept == contents.keys() - {"m.onnx.00000000.data"}


@pytest.mark.parametrize("limit", [1000, graph.SINGLE_FILE_LIMIT])
@pytest.mark.parametrize("stage", ["save", "check", "rename"])
def test_an_interruption_leaves_what_was_there(
    stage: str,
    limit: int,
    exported: ExportReport,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graph, "SINGLE_FILE_LIMIT", limit)
    model, path = graph.load_graph(exported.path), tmp_path / "m.onnx"
    graph.write_graph(model, path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    if stage == "save":
        monkeypatch.setattr(onnx_ir, "save", interrupt)
    elif stage == "rename":
        monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        graph.write_graph(model, path, check=interrupt if stage == "check" else None)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def outside(path: Path, location: str) -> None:
    """A graph that says that its weights lie at a place."""
    helper, kind = onnx.helper, onnx.TensorProto
    weight = kind(name="w", data_type=kind.FLOAT, dims=[2, 2], data_location=kind.EXTERNAL)
    for key, value in (("location", location), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    x, y = (helper.make_tensor_value_info(n, kind.FLOAT, [1, 2]) for n in "xy")
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight]
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model.producer_name = "effformer"
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../notes.txt", "link", "notes.txt"])
def test_weights_elsewhere_are_neither_read_nor_removed(
    location: str, exported: ExportReport, tmp_path: Path
) -> None:
    """Not even by one who pretends to be us: only files under names of ours are removed."""
    (tmp_path / "m").mkdir()
    for notes in (tmp_path / "notes.txt", tmp_path / "m" / "notes.txt"):
        notes.write_bytes(b"sixteen letters!")
    (tmp_path / "m" / "link").symlink_to(tmp_path / "notes.txt")
    path = tmp_path / "m" / "m.onnx"
    outside(path, location)
    if location != "notes.txt":
        with pytest.raises(FormatError, match="outside its folder, where nothing is read"):
            read_graph(path)
        with pytest.raises(FormatError, match="cannot load it"):
            Session(path)
    with pytest.raises(FormatError, match="did not write as graph"):
        graph.write_graph(graph.load_graph(exported.path), path)
    graph.write_graph(graph.load_graph(exported.path), path, force=True)
    assert sorted(p.name for p in path.parent.iterdir()) == ["link", "m.onnx", "notes.txt"]
    for notes in (tmp_path / "notes.txt", tmp_path / "m" / "notes.txt"):
        assert notes.read_bytes() == b"sixteen letters!"
    assert Session(path).outputs == ("output",)
