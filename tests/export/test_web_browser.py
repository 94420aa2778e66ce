"""The page of a bundle in headless Chromium. Needs a browser, and onnxruntime-web, which no Python package
holds: `npm install onnxruntime-web` here, or its folder in $ONNXRUNTIME_WEB.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import ISOLATED, Page, browser, find_chromium, served
from effformer.export import export_bundle, export_web, run
from effformer.export.pictures import write_image
from page_noise import normal
from PIL import Image

import effformer
from effformer.flow import trained_of

from .networks import randomize

RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", "node_modules/onnxruntime-web"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (RUNTIME / "package.json").is_file(),
        reason="needs onnxruntime-web: npm install onnxruntime-web, or its folder in $ONNXRUNTIME_WEB",
    ),
    pytest.mark.skipif(
        find_chromium() is None, reason="needs Chromium on the path, or in $CHROMIUM"
    ),
]
DONE = "['good', 'bad'].includes(document.getElementById('status')?.className)"
DRAWN = "!document.getElementById('save').disabled"
SAVED = """(async () => {
  const blobs = [];
  URL.createObjectURL = (blob) => { blobs.push(blob); return "data:,"; };
  document.getElementById("save").click();
  while (!blobs.length) await new Promise((resume) => setTimeout(resume, 5));
  const bytes = new Uint8Array(await blobs[0].arrayBuffer());
  return btoa(String.fromCharCode(...bytes));
})()"""


def model(**changes: Any) -> Any:
    sizes = {"input_size": 8, "channels": 1, "num_classes": 4, "learn_sigma": False, "depth": 1}
    return randomize(effformer.build_model("sit-nano", **(sizes | changes))).eval()


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def made(network: Any = None, **options: Any) -> Path:
        space = tmp_path_factory.mktemp("site")
        export_bundle(network or model(), space / "bundle", **({"steps": 4} | options))
        return export_web(space / "bundle", space / "site", runtime=RUNTIME).folder

    return made


@pytest.fixture(scope="module")
def site(make: Make) -> Path:
    return make()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


def set_to(page: Page, **values: str) -> None:
    for name, value in values.items():
        element = f"document.getElementById({name!r})"
        page.value(f"{element}.value = {value!r}; {element}.dispatchEvent(new Event('change'))")


def saved(page: Page) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(page.value(SAVED))))


def test_it_verifies_draws_and_saves(site: Path, page: Page, tmp_path: Path) -> None:
    with served(site) as address:
        page.open(address)
        page.wait(DRAWN)
        found = re.search(r"differs by (\S+) from the recorded", page.text("status"))
        assert found is not None
        assert float(found[1]) < 1e-4
        assert "WebAssembly with SIMD, 1 thread" in page.text("facts")
        assert "onnxruntime-web" in page.text("facts")
        set_to(page, label="each", steps="3", guidance="3.5", sampler="heun", seed="4294967295")
        page.value("document.getElementById('draw').click()")
        page.wait(f"{DRAWN} && document.getElementById('meter').innerText.includes('6 of 6')")
        picture, meter = saved(page), page.text("meter")
    edge = run.Bundle(site)
    noise = normal(2**32 - 1, 4 * 64).reshape(4, 1, 8, 8)
    drawn = edge.sample(range(4), steps=3, guidance=3.5, sampler="heun", noise=noise)
    write_image(tmp_path / "runner.png", edge.images(drawn))
    with Image.open(tmp_path / "runner.png") as expected:
        difference = np.asarray(picture, np.int16) - np.asarray(expected, np.int16)
    assert np.abs(difference).max() <= 1
    work = 6 * 8 * edge.facts["macs"]["velocity"]  # with and without labels
    assert f"{work / 1e6:.3g} M multiply-adds" in meter
    words = picture.text  # type: ignore[attr-defined]
    assert (words["Label"], words["Class"]) == ("0,1,2,3", "0, 1, 2, 3")
    assert (words["Steps"], words["Guidance"]) == ("3", "3.5")
    assert (words["Seed"], words["Sampler"]) == ("4294967295", "heun")
    assert (words["Model"], words["Multiply-adds"]) == (edge.facts["model"], str(work))


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "dynamic-uint8"},
        {"quantize": "int4"},
        {"cache": {"name": "newton", "every": 2, "warm": 1}, "sampler": "midpoint"},
        {"guidance": 1.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_bundles(options: dict[str, Any], page: Page, make: Make) -> None:
    with served(make(**options)) as address:
        page.open(address)
        page.wait(DRAWN)
        assert page.value("document.getElementById('status').className") == "good"
        cached = page.value("!document.querySelector('.cached').hidden")
        assert cached == ("cache" in options)


def test_other_models(page: Page, make: Make) -> None:
    """Colours, no squares, no null class; latents with and without a decoder."""
    decoder = torch.nn.ConvTranspose2d(4, 3, 2, 2)
    colours = model(channels=3, input_size=(8, 12), label_dropout=0.0)
    for folder, size, guided, note in (
        (make(colours), (64, 44), False, ""),
        (make(model(channels=4), decoder=decoder), (68, 68), True, ""),
        (make(model(channels=4)), (68, 68), True, "4 channels; the picture shows the first three"),
    ):
        with served(folder) as address:
            page.open(address)
            page.wait(DRAWN)
            picture = saved(page)
            assert page.value("!document.querySelector('.guided').hidden") == guided
            shown = page.text("note")
            assert note in shown
            assert bool(shown) == bool(note)
        assert (picture.mode, picture.size) == ("RGB", size)


def test_classes_have_names(page: Page, make: Make) -> None:
    network, names = model(), ("circle", "square", "star", "<b>名前</b>")
    record = trained_of(network)
    assert record is not None
    network.trained = record.replace(classes=names, value_range=(0.0, 1.0)).to_dict()
    with served(make(network)) as address:
        page.open(address)
        page.wait(DRAWN)
        options = "[...document.getElementById('label').options].map((one) => one.text)"
        assert page.value(options) == ["each of the 4", *names]
        set_to(page, label="3", count="4", seed="5")
        page.value("document.getElementById('draw').click()")
        page.wait(f"{DRAWN} && document.getElementById('canvas').ariaLabel.includes('seed 5')")
        words = saved(page).text  # type: ignore[attr-defined]
    assert (words["Class"], words["Label"]) == (names[3], "3,3,3,3")


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        ("app.js", "app.js cannot be loaded; copy the whole folder"),
        ("worker.js", "worker.js cannot be loaded"),
        ("bundle.json", "bundle.json cannot be fetched (the server answers 404)"),
        ("velocity.onnx", "velocity.onnx cannot be fetched (the server answers 404)"),
        ("ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.wasm cannot be fetched"),
        ("ort.wasm.bundle.min.mjs", "ort.wasm.bundle.min.mjs cannot be loaded"),
    ],
)
def test_what_cannot_be_fetched(without: str, sentence: str, site: Path, page: Page) -> None:
    with served(site, without=(without,)) as address:
        page.open(address)
        page.wait(DONE)
        assert sentence in page.text("status")


def newer(facts: dict[str, Any]) -> None:
    facts["format"] = 99


def stricter(facts: dict[str, Any]) -> None:
    facts["self_test"]["tolerance"] = 0


def larger(facts: dict[str, Any]) -> None:
    facts["files"]["velocity.onnx"]["bytes"] += 1


def another(facts: dict[str, Any]) -> None:
    facts["files"]["velocity.onnx"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (newer, "has format 99, this page reads up to 1"),
        (stricter, "this browser's velocity differs by"),
        (larger, "velocity.onnx: is damaged"),
        (another, "velocity.onnx: is damaged"),
        (dict.clear, "is not the description of a bundle"),
    ],
)
def test_what_does_not_fit(
    change: Callable[[dict[str, Any]], Any], sentence: str, site: Path, page: Page, tmp_path: Path
) -> None:
    shutil.copytree(site, tmp_path / "site")
    facts = json.loads((site / "bundle.json").read_text())
    change(facts)
    (tmp_path / "site" / "bundle.json").write_text(json.dumps(facts))
    with served(tmp_path / "site") as address:
        page.open(address)
        page.wait(DONE)
        assert sentence in page.text("status")
        assert page.value("document.getElementById('work').hidden")


@pytest.mark.parametrize(
    ("before", "sentence"),
    [
        ("delete globalThis.WebAssembly", "has no WebAssembly, in which the model runs"),
        ("WebAssembly.validate = () => false", "has no WebAssembly SIMD"),
        ("delete HTMLScriptElement.prototype.noModule", "is too old for this page"),
    ],
)
def test_browsers_that_cannot(before: str, sentence: str, site: Path) -> None:
    with browser() as page, served(site) as address:
        page.before(before)
        page.open(address)
        page.wait(DONE)
        assert sentence in page.text("status")


def test_a_file_is_no_server(site: Path, page: Page) -> None:
    page.open((site / "index.html").as_uri())
    page.wait(DONE)
    assert "python -m http.server" in page.text("status")


def test_isolated_pages_may_use_threads(site: Path, page: Page) -> None:
    with served(site, headers=ISOLATED) as address:
        page.open(address)
        page.wait(DRAWN)
        assert re.search(r"SIMD, \d+ threads?$", page.text("facts"), re.MULTILINE)


def test_a_request_is_stopped_or_refused(site: Path, page: Page) -> None:
    with served(site) as address:
        page.open(address)
        page.wait(DRAWN)
        set_to(page, count="16", steps="50", sampler="rk4")
        page.value(
            "document.getElementById('draw').click(); document.getElementById('stop').click()"
        )
        page.wait("document.getElementById('meter').innerText === 'stopped'")
        set_to(page, seed="-1")
        page.value("document.getElementById('draw').click()")
        assert page.text("meter") == "stopped"  # the form says what is wrong with the seed
        set_to(page, seed="1", steps="2")
        page.value("document.getElementById('draw').click()")
        page.wait("document.getElementById('meter').innerText.includes('8 of 8')")


@pytest.mark.parametrize("width", [400, 1200])
def test_it_fits(width: int, site: Path, page: Page) -> None:
    with served(site) as address:
        page.open(address, width=width)
        page.wait(DRAWN)
        assert page.value("document.documentElement.scrollWidth") <= width
        smallest = page.value(
            "Math.min(...[...document.querySelectorAll('main *')].filter((e) => e.innerText).map((e) =>"
            " parseFloat(getComputedStyle(e).fontSize)))"
        )
        assert smallest >= 13
