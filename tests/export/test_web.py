from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from effformer.export import BundleReport, WebReport, export_bundle, export_web, run, web
from effformer.export.pictures import write_image
from page_noise import normal
from PIL import Image
from web_package import package

from effformer.checks import FormatError
from effformer.profile import profile

from .networks import Flow

PAGE = Path(web.__file__).parent / "web"
NODE = pytest.mark.skipif(shutil.which("node") is None, reason="needs node on the path")


@pytest.fixture(scope="module")
def site(bundle: BundleReport, tmp_path_factory: pytest.TempPathFactory) -> WebReport:
    space = tmp_path_factory.mktemp("web")
    return export_web(bundle.folder, space / "site", runtime=package(space / "package"))


def test_a_site_is_a_bundle_with_a_page(site: WebReport, bundle: BundleReport) -> None:
    facts = json.loads((site.folder / "bundle.json").read_text())
    files = {path.name for path in site.folder.iterdir()}
    assert set(facts["files"]) == files - {"bundle.json"}
    assert {*json.loads((bundle.folder / "bundle.json").read_text())["files"]} < files
    assert {path.name for path in PAGE.iterdir()} - {"MIT.txt"} < files
    assert facts["web"]["runtime"] == {
        "name": "onnxruntime-web", "version": "1.30.0", "license": "MIT",
    }  # fmt: skip
    assert site.bytes == sum(path.stat().st_size for path in site.folder.iterdir())
    assert site.graphs == (site.folder / "velocity.onnx").stat().st_size
    edge = run.Bundle(site.folder)
    assert edge.self_test() <= 1e-4
    for record in (facts["self_test"], facts["self_test"]["sample"]):
        noise = np.load(site.folder / record["noise"])
        assert (noise == edge._start(len(record["labels"]), record["seed"], None)).all()


def test_work_is_that_of_the_model(bundle: BundleReport, flow: Flow) -> None:
    facts = run.Bundle(bundle.folder).facts
    inputs = torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    assert facts["macs"] == {"velocity": profile(flow, inputs, memory=False).total}


def test_the_page_loads_nothing_from_elsewhere() -> None:
    for path in PAGE.iterdir():
        found = re.findall(r"\w+://[^\s\"'.]+", path.read_text(encoding="utf-8"))
        assert set(found) <= {"http://localhost:8000"}, path.name


def test_the_licence_of_the_runtime_goes_along(bundle: BundleReport, tmp_path: Path) -> None:
    name = "onnxruntime-web-LICENSE.txt"
    export_web(bundle.folder, tmp_path / "site", runtime=package(tmp_path / "one"))
    text = (tmp_path / "site" / name).read_text()
    assert "the authors" in text
    assert "Permission is hereby granted" in text
    (package(tmp_path / "two") / "LICENSE").write_text("do what you like")
    export_web(tmp_path / "site", tmp_path / "site", runtime=tmp_path / "two")  # in its place
    assert (tmp_path / "site" / name).read_text() == "do what you like"


def test_what_is_no_runtime_is_refused(
    bundle: BundleReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=r"holds no onnxruntime-web.*npm install onnxruntime-web"):
        export_web(bundle.folder, "site")
    package(tmp_path / "other", name="left-pad")
    with pytest.raises(FormatError, match="another package"):
        export_web(bundle.folder, "site", runtime="other")
    old = package(tmp_path / "node_modules" / "onnxruntime-web", version="1.14.0")
    (old / "dist" / "ort.wasm.bundle.min.mjs").unlink()
    with pytest.raises(FormatError, match=r"1\.14\.0 has no dist/ort\.wasm"):
        export_web(bundle.folder, "site")
    assert not Path("site").exists()


def test_places(site: WebReport, bundle: BundleReport, flow: Flow, tmp_path: Path) -> None:
    runtime = package(tmp_path / "package")
    with pytest.raises(run.BundleError, match="no such folder"):
        export_web(tmp_path / "none", tmp_path / "site", runtime=runtime)
    shutil.copytree(bundle.folder, tmp_path / "site")
    export_web(bundle.folder, tmp_path / "site", runtime=runtime)  # in place of a bundle
    with pytest.raises(FormatError, match=r"also holds app\.js"):
        export_bundle(
            flow, tmp_path / "site", shape=(1, 8, 8), num_classes=3, convention="effformer",
            verify=False,
        )  # fmt: skip
    (tmp_path / "site" / "mine.txt").touch()
    with pytest.raises(FormatError, match=r"also holds mine\.txt"):
        export_web(bundle.folder, tmp_path / "site", runtime=runtime)


def node(folder: Path, code: str, given: Any = None) -> Any:
    """What a script gives as JSON that imports the page's modules."""
    for path in PAGE.glob("*.js"):
        shutil.copy(path, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "script.js").write_text(
        'import { readFileSync } from "node:fs";\n'
        'const given = JSON.parse(readFileSync(0, "utf-8"));\n' + code
    )
    done = subprocess.run(
        ["node", "script.js"], cwd=folder, input=json.dumps(given), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@NODE
@pytest.mark.parametrize("name", ["app.js", "worker.js"])
def test_syntax(name: str, tmp_path: Path) -> None:
    shutil.copy(PAGE / name, tmp_path / "module.mjs")
    command = ["node", "--check", str(tmp_path / "module.mjs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Known(run.Bundle):
    """A bundle of graphs that add and multiply, so that both runners round alike."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.folder, self.facts, self.shape = Path("known"), facts, tuple(facts["shape"])
        self._velocity, self._light = "velocity", "light"

    def _run(self, session: str, feed: dict[str, Any], count: int = 1) -> list[Any]:
        t, half, quarter = feed["t"][:, None, None, None], np.float32(0.5), np.float32(0.25)
        if session == "light":
            return [feed["change"] * half + t]
        y = feed["y"].astype(np.float32)[:, None, None, None]
        return [feed["x"] * half + t - y * quarter, feed["x"] * quarter + t][:count]


SCRIPT = """
import { Bundle } from "./bundle.js";
const f32 = Math.fround;
class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
const graphs = {
  velocity: { inputNames: ["x", "t", "y"], outputNames: ["velocity", "change"], run: async ({ x, t, y }) => {
    const size = x.data.length / t.data.length;
    const of = (n) => Math.floor(n / size);
    const v = x.data.map((a, n) => f32(f32(a * 0.5) + t.data[of(n)]) - f32(Number(y.data[of(n)]) * 0.25));
    const change = x.data.map((a, n) => f32(a * 0.25) + t.data[of(n)]);
    return { velocity: new Tensor("float32", v, x.dims), change: new Tensor("float32", change, x.dims) };
  } },
  light: { inputNames: ["x", "t", "y", "change"], outputNames: ["velocity"], run: async ({ x, t, change }) => {
    const size = x.data.length / t.data.length;
    const v = change.data.map((a, n) => f32(a * 0.5) + t.data[Math.floor(n / size)]);
    return { velocity: new Tensor("float32", v, x.dims) };
  } },
};
const ort = { Tensor, InferenceSession: { create: async (bytes) => graphs[new TextDecoder().decode(bytes)] } };
const read = async (name) => new TextEncoder().encode(name === "bundle.json" ? JSON.stringify(given.facts) : name);
const bundle = await Bundle.open(ort, read);
const out = [];
for (const { labels, ...options } of given.requests) {
  const work = {};
  const told = (graph, count) => { work[graph] = (work[graph] ?? 0) + count; };
  out.push({ x: [...await bundle.sample(labels, given.noise, { ...options, told })], work });
}
console.log(JSON.stringify(out));
"""


@NODE
def test_the_page_samples_as_the_runner_does(tmp_path: Path) -> None:
    """Bit for bit, with every sampler, with and without guidance and a cache."""
    file = lambda name: {"bytes": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}  # noqa: E731
    facts = {
        "format": 1, "shape": [2, 3, 4], "num_classes": 5, "null_label": 5, "web": {},
        "graphs": {"velocity": "velocity", "light": "light"},
        "files": {name: file(name) for name in ("velocity", "light")},
        "sampler": {
            "name": "heun", "steps": 6, "guidance": 2.5, "guidance_channels": 1,
            "cache": {"every": 3, "warm": 2, "order": 2},
        },
    }  # fmt: skip
    noise = np.random.default_rng(0).standard_normal((3, 2, 3, 4), dtype=np.float32)
    requests: list[dict[str, Any]] = [
        {"labels": [0, 3, 4], "steps": steps, "guidance": scale, "sampler": name, "cache": cache}
        for name, steps in (("euler", 7), ("midpoint", 3), ("heun", 4), ("rk4", 2))
        for scale in (1.0, 2.7, -1.3)
        for cache in (True, False)
    ]
    given = {"facts": facts, "noise": noise.ravel().tolist()}
    found = node(tmp_path, SCRIPT, given | {"requests": [*requests, {"labels": [0, 3, 4]}]})
    runner = Known(facts)
    for request, answer in zip([*requests, {"labels": [0, 3, 4]}], found, strict=True):
        expected = runner.sample(**request, noise=noise)
        actual = np.asarray(answer["x"], dtype=np.float32).reshape(expected.shape)
        assert (actual == expected).all(), request
    assert found[-1]["work"] == {"velocity": 6 * 6, "light": 6 * 6}  # of 12 evaluations of 2 x 3


@NODE
def test_noise(tmp_path: Path) -> None:
    code = """
    import { normal } from "./bundle.js";
    console.log(JSON.stringify(given.map(([seed, count]) => [...normal(seed, count)])));
    """
    asked = [[0, 20_001], [1, 7], [2**32 - 1, 8]]
    found = node(tmp_path, code, asked)
    for (seed, count), actual in zip(asked, found, strict=True):
        expected = torch.from_numpy(normal(seed, count))
        assert_close(torch.tensor(actual), expected, rtol=1e-5, atol=1e-6)
    first = np.asarray(found[0])
    assert abs(first.mean()) < 0.03
    assert abs(first.std() - 1) < 0.03
    assert not np.allclose(found[1], first[:7])


@NODE
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 5, 70)])
def test_pictures_are_those_of_the_runner(
    channels: int, height: int, width: int, tmp_path: Path
) -> None:
    code = """
    import { grid, pixels, png } from "./picture.js";
    const data = Float32Array.from(given.data);
    const picture = grid(pixels({ data, dims: given.dims }, given.range));
    console.log(JSON.stringify(Buffer.from(await png(picture, given.words)).toString("base64")));
    """
    samples = np.random.default_rng(0).standard_normal((3, channels, height, width), np.float32)
    low, high = -1.0, 1.5
    between = (np.arange(samples[0].size) % 255 + 0.5) / 255  # as near to one grey as to the next
    samples[0] = (low + (high - low) * between).reshape(samples[0].shape)
    scaled = np.clip((samples - low) / (high - low), 0.0, 1.0) * 255.0  # as `Bundle.images`
    write_image(tmp_path / "runner.png", scaled.round().astype(np.uint8).transpose(0, 2, 3, 1))
    words = {"Software": "effformer:samples", "Class": "Kürbis", "Model": "名前", "Seed": "7"}
    given = {"data": samples.ravel().tolist(), "dims": list(samples.shape), "range": [low, high]}
    made = base64.b64decode(node(tmp_path, code, given | {"words": words}))
    with Image.open(io.BytesIO(made)) as page, Image.open(tmp_path / "runner.png") as expected:
        assert page.mode == expected.mode
        assert (np.asarray(page) == np.asarray(expected)).all()
        assert page.text == words  # type: ignore[attr-defined]
    (tmp_path / "page.png").write_bytes(made)
    write_image(tmp_path / "page.png", np.zeros((1, 8, 8, 1), np.uint8))  # known as samples


@NODE
def test_arrays(tmp_path: Path) -> None:
    code = """
    import { readArray } from "./bundle.js";
    const read = (name, shape) => {
      try { return [...readArray(new Uint8Array(Buffer.from(given[name], "base64")), name, shape)]; }
      catch (error) { return `${error.constructor.name}: ${error.message}`; }
    };
    console.log(JSON.stringify([read("good", [2, 3]), read("good", [3, 2]), read("double", [2])]));
    """
    good = np.arange(6, dtype=np.float32).reshape(2, 3)
    files = {}
    for name, array in (("good", good), ("double", np.zeros(2))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        files[name] = base64.b64encode(buffer.getvalue()).decode()
    numbers, *refused = node(tmp_path, code, files)
    assert numbers == good.ravel().tolist()
    assert refused[0] == "BundleError: good: does not hold float32 numbers of shape [3,2]"
    assert "double: does not hold float32" in refused[1]
