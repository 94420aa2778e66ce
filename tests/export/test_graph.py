from __future__ import annotations

from pathlib import Path

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
        monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        graph.write_graph(model, path, check=interrupt if stage == "check" else None)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
