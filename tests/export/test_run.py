from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

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
        (_edit(format=99), "has format 99, this runner reads up to 1"),
        (_damage, "is damaged"),
        (
            _edit(graphs={"velocity": "other.onnx"}),
            "graph is 'other.onnx', which is none of its files",
        ),
        (_edit(graphs={"velocity": ["x"]}), "the velocity graph is ['x']"),
        (_edit(graphs={}), "the velocity graph is None"),
        (_edit(graphs={"velocity": "velocity.onnx", "decoder": "d.onnx"}), "the decoder graph is"),
        (_edit(files={"velocity.onnx": {"bytes": 1}}), "lists 'velocity.onnx' without a checksum"),
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
        (["--labels", "0,x"], "expected class ids such as 0,1,2"),
        (["--labels", "2-1"], "the range is empty"),
        (["--labels", "0-99999999999"], "at most 10000 pictures at once"),
        (["--labels", "0", "--seed", "-1"], "seed must be at least 0"),
        (["--labels", "0", "--threads", "0"], "--threads must lie in 1..1024"),
        (["--labels", "0,3"], "label 3 is not one of the classes 0..2"),
        ([], "no labels given"),
        (["--labels", "0", "--steps", "0"], "steps must be at least 1"),
        (["--labels", "0", "--guidance", "nan"], "guidance must be a finite number"),
        (["--labels", "0", "--sampler", "dopri"], "unknown sampler 'dopri'; choices: euler"),
        (["--labels", "0", "--out", "s.jpg"], "written as .png or .npy, not as .jpg"),
        (["--labels", "0", "--out", "no/such/folder/s.png"], "cannot be written"),
    ],
)
def test_bad_requests_end_with_code_2(
    options: list[str], message: str, bundle: BundleReport, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundle.folder), *options]) == 2
    assert message in capsys.readouterr().err


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


def test_a_graph_that_onnxruntime_refuses(
    bundle: BundleReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import hashlib

    shutil.copytree(bundle.folder, tmp_path / "b")
    (tmp_path / "b" / "velocity.onnx").write_bytes(zlib.compress(b"no graph"))
    facts = json.loads((tmp_path / "b" / "bundle.json").read_text())
    digest = hashlib.sha256(zlib.compress(b"no graph")).hexdigest()
    facts["files"]["velocity.onnx"]["sha256"] = digest
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(facts))
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
