"""ONNX Runtime's calibrator: thresholds by percentile and entropy, from its histograms.

Its histograms widen by whole bins of the first batch's width; ours double their range. The rules that
read them are one and the same here.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from effformer.compress.quant.histogram import Histogram, entropy_range, percentile_range
from effformer.export import calibrate_onnx, export_onnx
from harness import Golden
from torch import Tensor, nn


def check(golden: Golden) -> None:
    for key in golden.keys("out.hist."):
        _check_case(golden, key.removeprefix("out.hist."))


def _check_case(golden: Golden, name: str) -> None:
    data, method, form, bins = name.split(".")
    counts = golden.tensor(f"out.hist.{name}")
    low, high, edges = golden.tensor(f"out.edges.{name}").tolist()
    line = torch.linspace(low, high, int(edges) + (int(edges) == len(counts)), dtype=torch.float64)
    values = torch.cat([golden.tensor(k) for k in golden.keys(f"in.{data}.")])
    if method == "entropy":
        levels = golden.config[f"entropy.{bins}"]["quantized_bins"]
        found = entropy_range(counts, line, levels=levels, spread_whole=True)
        found = max(found[0], float(values.min())), min(found[1], float(values.max()))
    else:
        percent = golden.config[f"percentile.{form}"][1]
        found = _percentile(counts, line, percent, values, symmetric=form == "sym")
    golden.assert_close(torch.tensor(found, dtype=torch.float64), f"out.{method}.{name}", rtol=5e-5)
    _check_streaming(golden.keys(f"in.{data}."), golden, found, method, form)


def _percentile(
    counts: Tensor, line: Tensor, percent: float, values: Tensor, *, symmetric: bool
) -> tuple[float, float]:
    if not symmetric:
        low, high = percentile_range(counts, line, percent)
        return max(low, float(values.min())), min(high, float(values.max()))
    # magnitudes: as many values lie beyond one end as are allowed beyond both
    top = min(percentile_range(counts, line, 2 * percent - 100)[1], float(values.abs().max()))
    return max(-top, float(values.min())), top


def _check_streaming(
    keys: list[str], golden: Golden, found: tuple[float, float], method: str, form: str
) -> None:
    """Our histogram of the same data gives the same percentile, up to the width of a bin."""
    if method != "percentile" or form != "asym":
        return
    histogram = Histogram()
    for key in keys:
        histogram.add(golden.tensor(key))
    percent = golden.config[f"percentile.{form}"][1]
    ours = histogram.range("percentile", percent)
    width = 2 * max(abs(found[0]), abs(found[1])) / 512
    assert abs(ours[0] - min(found[0], 0.0)) <= width
    assert abs(ours[1] - found[1]) <= width
    assert _of_a_graph(keys, golden, percent) == pytest.approx(ours)


def _of_a_graph(keys: list[str], golden: Golden, percent: float) -> tuple[float, float]:
    """The range that a graph with one product is calibrated to."""
    with TemporaryDirectory() as folder:
        path, rows = Path(folder) / "graph.onnx", [golden.tensor(k).view(-1, 7) for k in keys]
        export_onnx(nn.Linear(7, 2), path, rows[0], verify=False)
        ranges = calibrate_onnx(path, [(x,) for x in rows], percentile=percent / 100).ranges
    return next(iter(ranges.values()))
