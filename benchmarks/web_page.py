"""The page that `effformer export --target web` writes, in headless Chromium: size of the model, time
until it has verified itself and drawn a first digit, and time of a digit beside ONNX Runtime's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from effformer.compress import quantize
from effformer.export import export_bundle, export_web
from effformer.export.run import Bundle
from markdown import Row, write

import effformer
from effformer.profile import machine

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from browser import browser, served

DIGITS = {"input_size": 8, "channels": 1, "num_classes": 10, "learn_sigma": False}
DRAWN = "document.getElementById('save')?.disabled === false"
RUNS = 9


def first_digit(site: Path) -> float:
    """Seconds from the address to the digit, in a browser that never saw the page."""
    with served(site) as address, browser() as page:
        start = time.perf_counter()
        page.open(address)
        page.wait(DRAWN)
        return time.perf_counter() - start


def digits(site: Path) -> tuple[list[float], str]:
    """Seconds that a page which is open takes for one digit each, as it says, and its browser."""
    times = []
    with served(site) as address, browser() as page:
        page.open(address)
        for _ in range(RUNS):
            page.wait(DRAWN)
            times.append(float(page.text("meter").split()[-2]))
            page.value("document.getElementById('draw').click()")
        return times, str(page.value("navigator.userAgent").split("Chrome/")[1].split()[0])


def native(site: Path) -> list[float]:
    bundle, times = Bundle(site, threads=1), []
    for seed in range(RUNS):
        start = time.perf_counter()
        bundle.sample([0], seed=seed)
        times.append(time.perf_counter() - start)
    return times


def row(what: str, values: list[float], target: float | None = None) -> Row:
    deciles = quantiles(values, n=10)
    spread, middle = f"{deciles[0]:.2f} to {deciles[-1]:.2f}", median(values)
    return Row(what=what, value=f"{middle:.3f} s", spread=spread, ratio=middle, target=target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime", type=Path, help="default: node_modules/onnxruntime-web")
    runtime = parser.parse_args().runtime
    torch.manual_seed(0)
    model = effformer.build_model("sit-tiny", attn="flow", **DIGITS).eval()
    torch.nn.init.normal_(model.final.linear.weight, std=0.02)  # zero until it is trained
    rows, load = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        sites = {}
        for name in ("float32", "int8", "nf4"):
            form = model if name == "float32" else quantize(model, name)[0]
            bundle, sites[name] = Path(folder) / f"{name} bundle", Path(folder) / name
            export_bundle(form, bundle, steps=10, guidance=2.0)
            report = export_web(bundle, sites[name], runtime=runtime)
            size = report.graphs / 1e6
            rows.append(
                Row(what=f"graph, {name} (MB)", value=f"{size:.2f} MB", ratio=size, target=3)
            )
        beside = (report.bytes - report.graphs) / 1e6
        rows.append(Row(what="the runtime and the page, once", value=f"{beside:.2f} MB"))
        for name, site in sites.items():
            times = [first_digit(site) for _ in range(RUNS)]
            rows.append(row(f"from the address to the first digit, {name} (seconds)", times, 3))
        page, version = digits(sites["float32"])
        rows += [
            row("one more digit in the page, float32 (seconds)", page),
            row("the same by `run.py`, 1 thread (seconds)", native(sites["float32"])),
        ]
        used = report.runtime
    notes = [
        "the digits recipe's sit-tiny with flow attention, 8x8, random weights; 10 euler steps with guidance 2: "
        "20 evaluations of one sample",
        f"headless Chromium {version} with a fresh profile for every first digit, {used}, 1 thread, from "
        "`python -m http.server`'s handler on the same machine; the time includes loading and compiling 14 MB "
        "of WebAssembly, checksums, the self test and the picture",
        f"load of the machine (processes that want a core) before the run: {load:.1f}",
        "sizes in millions of bytes; the ratio column holds megabytes or seconds",
    ]
    write("web_page", "The page in a browser", rows, machine(), notes)


if __name__ == "__main__":
    main()
