"""A bundle with a page around it: a static folder that verifies itself and draws in a browser."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effformer.arguments import checked
from effformer.checks import FormatError
from effformer.files import atomic_folder, check_folder, read_json
from effformer.notebook import Shown

from . import run
from .bundle import FOLDER
from .record import finish

__all__ = ["BINARY", "LOADER", "Runtime", "WebReport", "check_site", "export_web", "find_runtime"]

RUNTIME = "onnxruntime-web"
_PAGE = Path(__file__).parent / "web"
_FILES = ("index.html", "style.css", "app.js", "worker.js", "bundle.js", "picture.js")
_LICENSE = "onnxruntime-web-LICENSE.txt"
LOADER, BINARY = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
_SITE: Any = FOLDER | {
    "own": (*FOLDER["own"], *_FILES, "self_test*_noise.npy", LOADER, BINARY, _LICENSE)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The package onnxruntime-web, as npm unpacks it.

    Attributes:
        folder: the package.
        version: its version.
        license: its licence, as the package names it.
    """

    folder: Path
    version: str
    license: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WebReport(Shown):
    """What `export_web` wrote.

    Attributes:
        folder: the site.
        bytes: size of all its files.
        graphs: size of the graphs, which is what differs from model to model.
        runtime: name and version of the runtime in it.
    """

    folder: Path
    bytes: int
    graphs: int
    runtime: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "folder": str(self.folder), "bytes": self.bytes, "graphs": self.graphs, "runtime": self.runtime,
        }  # fmt: skip


@checked
def export_web(
    bundle: str | Path,
    folder: str | Path,
    *,
    runtime: str | Path | None = None,
    force: bool = False,
) -> WebReport:
    """Write a bundle as a static folder, whose page draws in a browser.

    The page loads nothing from elsewhere. It compares what the browser computes with what the bundle
    recorded, then draws; any web server can serve it (``python -m http.server``). The folder is still
    a bundle: `run.py` in it, `run.Bundle` and ``effformer verify`` take it.

    Args:
        bundle: a folder that `export_bundle` wrote.
        folder: new, empty, or an earlier bundle or site, which is replaced when the new one is
            complete; ``bundle`` itself is possible.
        runtime: the npm package onnxruntime-web, unpacked; None looks in ``node_modules`` here. Two of
            its files, 14 MB, are copied.
        force: replace a bundle that others wrote as well.

    Raises:
        FormatError: no runtime, or the folder holds something else or cannot be written.
        BundleError: ``bundle`` is none, or an incomplete or damaged one.
    """
    package = find_runtime(runtime)
    source = run.Bundle(bundle)
    facts = source.facts
    with atomic_folder(folder, **_SITE, force=force) as temporary:
        for name in facts["files"]:
            shutil.copyfile(source.folder / name, temporary / name)
        for name in _FILES:
            shutil.copyfile(_PAGE / name, temporary / name)
        for name in (LOADER, BINARY):
            shutil.copyfile(package.folder / "dist" / name, temporary / name)
        (temporary / _LICENSE).write_text(_license(package), encoding="utf-8")
        for record in (facts["self_test"], facts["self_test"].get("sample")):
            if record is not None:
                record["noise"] = record["file"].replace(".npy", "_noise.npy")
                shape = (len(record["labels"]), *source.shape)
                draws = np.random.default_rng(record["seed"])  # JavaScript has another
                noise = draws.standard_normal(shape, dtype=np.float32)
                np.save(temporary / record["noise"], noise, allow_pickle=False)
        facts["web"] = {
            "page": "index.html",
            "runtime": {"name": RUNTIME, "version": package.version, "license": package.license},
        }
        finish(temporary, facts)
        sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
    return WebReport(
        folder=Path(folder),
        bytes=sum(sizes.values()),
        graphs=sum(size for name, size in sizes.items() if ".onnx" in name),
        runtime=f"{RUNTIME} {package.version}",
    )


def check_site(folder: Path, *, force: bool = False) -> None:
    """Refuse a place that `export_web` could not write, before there is anything to write.

    Raises:
        FormatError: it holds something else.
    """
    check_folder(folder, **_SITE, force=force)


@checked
def find_runtime(folder: str | Path | None = None) -> Runtime:
    """The package onnxruntime-web in a folder, None looks in ``node_modules`` here.

    Raises:
        FormatError: it is not there, or lacks what a page needs.
    """
    place = Path("node_modules", RUNTIME) if folder is None else Path(folder)
    how = (
        f"run `npm install {RUNTIME}` here, or give its folder with --runtime (runtime= in Python)"
    )
    if not (place / "package.json").is_file():
        raise FormatError(f"{place}: holds no {RUNTIME}, which runs the model in the page; {how}")
    facts = read_json(place / "package.json")
    if not isinstance(facts, dict) or facts.get("name") != RUNTIME:
        raise FormatError(f"{place}: is another package than {RUNTIME}; {how}")
    version = str(facts.get("version"))
    for name in (LOADER, BINARY):
        if not (place / "dist" / name).is_file():
            why = f"{RUNTIME} {version} has no dist/{name}"
            raise FormatError(f"{place}: {why}; run `npm install {RUNTIME}@latest`")
    return Runtime(folder=place, version=version, license=str(facts.get("license")))


def _license(package: Runtime) -> str:
    """The licence in the package, or what stands at the head of its code and the text that this means."""
    for found in sorted(package.folder.glob("LICENSE*")):
        return found.read_text(encoding="utf-8")
    code = (package.folder / "dist" / LOADER).read_text(encoding="utf-8")
    head = code[: code.find("*/") + 2] if code.startswith("/*") else ""
    text = (_PAGE / "MIT.txt").read_text(encoding="utf-8") if package.license == "MIT" else ""
    return f"{RUNTIME} {package.version}, licence: {package.license}\n\n{head}\n\n{text}"
