from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effformer.export import BundleReport, run
from effformer.export.run import Bundle, BundleError, main, write_image

BLOCKER = """
import runpy, sys

class Block:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
sys.argv = {argv!r}
runpy.{run}
"""


def _python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_copy_in_the_bundle_needs_numpy_and_onnxruntime_only(
    bundle: BundleReport, tmp_path: Path
) -> None:
    script = str(bundle.folder / "run.py")
    code = BLOCKER.format(
        blocked=("torch", "effformer", "onnx", "onnxscript", "safetensors"),
        argv=[script, "--labels", "0-2,1", "--out", "s.png", "--threads", "1"],
        run=f"run_path({script!r}, run_name='__main__')",
    )
    done = _python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_the_module_in_the_package_needs_no_torch(bundle: BundleReport, tmp_path: Path) -> None:
    argv = ["run", str(bundle.folder), "--labels", "2,0", "--out", "s.npy", "--seed", "5"]
    code = BLOCKER.format(
        blocked=("torch", "onnx", "onnxscript"),
        argv=argv,
        run="run_module('effformer.export.run', run_name='__main__')",
    )
    done = _python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    expected = Bundle(bundle.folder).sample([2, 0], seed=5)
    torch.testing.assert_close(np.load(tmp_path / "s.npy"), expected, rtol=1e-5, atol=1e-6)


def test_noise_comes_from_the_seed(bundle: BundleReport) -> None:
    edge = Bundle(bundle.folder)
    first = edge.sample([0], seed=1)
    np.testing.assert_array_equal(first, edge.sample([0], seed=1))
    assert np.abs(first - edge.sample([0], seed=2)).max() > 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_pictures(channels: int, tmp_path: Path) -> None:
    from matplotlib.image import imread

    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6, channels), dtype=np.uint8)
    write_image(tmp_path / "p.png", pixels, zoom=2)
    grid = (imread(tmp_path / "p.png") * 255).round().astype(np.uint8)
    grid = grid.reshape(*grid.shape[:2], -1)
    assert grid.shape == (2 * 10 + 2, 2 * 14 + 2, channels)
    np.testing.assert_array_equal(grid[2:10:2, 16:28:2], pixels[1])
    np.testing.assert_array_equal(grid[12:20:2, 2:14:2], pixels[2])


def _edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        facts = json.loads((folder / "bundle.json").read_text())
        (folder / "bundle.json").write_text(json.dumps(facts | changes))

    return change


def _damage(folder: Path) -> None:
    path = folder / "velocity.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "bundle.json").unlink(), "not a bundle or was not written"),
        (lambda folder: (folder / "velocity.onnx").unlink(), "is missing from the bundle"),
        (lambda folder: (folder / "bundle.json").write_text("{"), "is not readable JSON"),
        (lambda folder: (folder / "bundle.json").write_text("[1]"), "not the description of a"),
        (_edit(shape=5), "shape is 5; copy the folder again"),
        (_edit(format=99), "has format 99, this runner reads up to 2"),
        (_damage, "is damaged"),
        (
            _edit(graphs={"velocity": "other.onnx"}),
            "'other.onnx' is not one of the files of the bundle",
        ),
        (_edit(graphs={"velocity": ["x"]}), "['x'] is not one of the files"),
        (_edit(graphs={}), "None is not one of the files"),
        (
            _edit(graphs={"velocity": "velocity.onnx", "decoder": "d.onnx"}),
            "'d.onnx' is not one of the files",
        ),
        (_edit(files={"velocity.onnx": {"bytes": 1}}), "files.velocity.onnx.sha256 is missing"),
    ],
)
def test_broken_bundles_end_with_code_2(
    change: Callable[[Path], None],
    message: str,
    bundle: BundleReport,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "b"
    shutil.copytree(bundle.folder, folder)
    change(folder)
    assert main([str(folder), "--labels", "0", "--out", str(tmp_path / "s.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "s.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "²"], "expected class ids"),
        (["--labels", "9" * 5000], "at most 10000 pictures at once"),
        (["--labels", ",".join(["0-9"] * 1001)], "at most 10000 pictures at once"),
        (["--labels", "0", "--steps", "1000000"], "steps must be a whole number in 1..10000"),
        (["--labels", "0", "--seed", "9" * 30], "seed must be a whole number in 0.."),
        (["--labels", "0", "--guidance", "1e308"], "guidance must be a number in -1000..1000"),
        (["--labels", "0", "--out", "x" * 300 + ".png"], "cannot be written"),
        (["--labels", "0,x"], "expected class ids such as 0,1,2"),
        (["--labels", "2-1"], "the range is empty"),
        (["--labels", "0-99999999999"], "at most 10000 pictures at once"),
        (["--labels", "0", "--seed", "-1"], "seed must be a whole number in 0.."),
        (["--labels", "0", "--threads", "0"], "threads must be a whole number in 1..1024"),
        (["--labels", "0,3"], "label 3 is not one of the classes 0..2"),
        ([], "no labels given"),
        (["--labels", "0", "--steps", "0"], "steps must be a whole number in 1..10000, got 0"),
        (
            ["--labels", "0", "--guidance", "nan"],
            "guidance must be a number in -1000..1000, got nan",
        ),
        (["--labels", "0", "--sampler", "dopri"], "unknown sampler 'dopri'; choices: euler"),
        (["--labels", "0", "--out", "s.jpg"], "written as .png or .npy"),
        (["--labels", "0", "--out", "no/such/folder/s.png"], "lies in no folder"),
    ],
)
def test_bad_requests_end_with_code_2(
    options: list[str], message: str, bundle: BundleReport, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundle.folder), *options]) == 2
    assert message in capsys.readouterr().err


def _fields(facts: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in facts.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from _fields(value, (*above, name))


UNUSED = {"effformer", "model", "convention", "network_convention", "trained", "quantization"}
HOSTILE: tuple[Any, ...] = (
    None, True, -7, 1e300, math.nan, 10**30, "", "../x", "a\0b", [], [math.nan] * 3, {}, [[[]]],
)  # fmt: skip
MEANT = [
    (("sampler", "guidance"), -7), (("sampler", "guidance_channels"), None),
    (("graphs", "decoder"), None), (("self_test", "sample"), None), (("session", "threads"), None), (("macs",), {}),
    *((("session", name), True) for name in ("spinning", "denormals_to_zero", "arena")),
]  # fmt: skip


def test_every_field_of_a_hostile_bundle_is_refused(
    bundle: BundleReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "b", tmp_path / "s.png"
    shutil.copytree(bundle.folder, folder)
    text = (folder / "bundle.json").read_text()
    fields = [f for f in _fields(json.loads(text)) if f[0] not in UNUSED]
    assert len(fields) > 25
    for field in fields:
        for value in HOSTILE:
            if (field, value) in MEANT:
                continue
            facts = json.loads(text)
            inner = facts
            for name in field[:-1]:
                inner = inner[name]
            inner[field[-1]] = value
            (folder / "bundle.json").write_text(json.dumps(facts))
            code = main([str(folder), "--labels", "0", "--out", str(out)])
            said = capsys.readouterr().err
            assert code == 2, f"{field} = {value!r}: {said}"
            assert said.startswith(f"error: {folder}"), said
            assert said.count("\n") == 1, said
    assert not out.exists()


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"", b'{"format": true}'],
)
def test_descriptions_that_are_none(
    text: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle.json").write_bytes(text)
    assert main([str(tmp_path), "--labels", "0"]) == 2
    assert str(tmp_path / "bundle.json") in capsys.readouterr().err


def _npy(x: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()


RECORD = np.ones((2, 1, 8, 8))
FILES = {
    "empty": b"", "text": b"x", "zip": b"PK\x03\x04aaaa", "truncated": _npy(RECORD)[:200],
    "objects": _npy(np.array([{}])), "integers": _npy(RECORD.astype(int)),
    "other shape": _npy(np.ones(3)), "not a number": _npy(RECORD * math.nan),
    "huge": _npy(RECORD).replace(b"(2, 1, 8, 8)", b"(9999999999,)"),
    "broken header": b"\x93NUMPY\x01\x00\x10\x00" + b"{" * 16,
}  # fmt: skip


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_records_that_are_none(
    content: bytes, bundle: BundleReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _with(bundle, tmp_path / "b", "self_test.npy", content)
    assert main([str(folder), "--self-test"]) == 2
    assert "self_test.npy: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["elsewhere", "itself", "pipe"])
def test_files_of_a_bundle_lie_in_it(
    kind: str, bundle: BundleReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "b"
    shutil.copytree(bundle.folder, folder)
    graph = folder / "velocity.onnx"
    graph.unlink()
    if kind == "pipe":
        os.mkfifo(graph)
    else:
        graph.symlink_to(bundle.folder / graph.name if kind == "elsewhere" else graph)
    assert main([str(folder), "--labels", "0"]) == 2
    found = "leads out of the bundle" if kind == "elsewhere" else "is missing from the bundle"
    assert found in capsys.readouterr().err


def test_a_graph_that_fails_while_it_runs(
    bundle: BundleReport,
) -> None:
    edge = Bundle(bundle.folder)
    edge.shape = (3, 8, 8)  # what the graph was not made for
    with pytest.raises(BundleError, match="onnxruntime cannot run it"):
        edge.sample([0])


def test_self_test(bundle: BundleReport, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle.folder), "--self-test"]) == 0
    assert "agrees within" in capsys.readouterr().out


def test_latents_are_no_pictures_and_noise_has_a_shape(bundle: BundleReport) -> None:
    edge = Bundle(bundle.folder)
    with pytest.raises(BundleError, match="samples have 4 channels"):
        edge.images(np.zeros((1, 4, 8, 8), np.float32))
    with pytest.raises(BundleError, match="noise must have shape"):
        edge.sample([0], noise=np.zeros((1, 1, 4, 4), np.float32))
    edge.facts["null_label"] = None
    with pytest.raises(BundleError, match="needs a null class"):
        edge.sample([0])
    assert edge.sample([0], guidance=1.0).shape == (1, 1, 8, 8)


def _with(bundle: BundleReport, folder: Path, name: str, content: bytes) -> Path:
    """A copy of a bundle with another file, whose record fits it."""
    shutil.copytree(bundle.folder, folder)
    (folder / name).write_bytes(content)
    facts = json.loads((folder / "bundle.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    facts["files"][name] = {"bytes": len(content), "sha256": digest}
    (folder / "bundle.json").write_text(json.dumps(facts))
    return folder


def test_a_graph_that_onnxruntime_refuses(
    bundle: BundleReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _with(bundle, tmp_path / "b", "velocity.onnx", zlib.compress(b"no graph"))
    assert main([str(tmp_path / "b"), "--labels", "0"]) == 2
    assert "cannot load it" in capsys.readouterr().err


def test_the_runner_is_one_file(bundle: BundleReport) -> None:
    assert (bundle.folder / "run.py").read_text() == Path(str(run.__file__)).read_text()


def test_only_samples_are_replaced(bundle: BundleReport, tmp_path: Path) -> None:
    words = [str(bundle.folder), "--labels", "0", "--steps", "1", "--out"]
    (tmp_path / "real").mkdir()
    for suffix in ("png", "npy"):
        place, link = tmp_path / "real" / f"s.{suffix}", tmp_path / f"link.{suffix}"
        link.symlink_to(place)
        assert main([*words, str(link)]) == 2  # a link to nowhere
        for _ in range(2):
            assert main([*words, str(place)]) == 0
        assert main([*words, str(link)]) == 0
        assert link.is_symlink()
        place.write_bytes(b"a picture of mine")
        assert main([*words, str(place)]) == 2
        assert place.read_bytes() == b"a picture of mine"
        assert main([*words, str(place), "--force"]) == 0
    assert np.load(tmp_path / "real" / "s.npy").shape[0] == 1
    assert len(list((tmp_path / "real").iterdir())) == 2
