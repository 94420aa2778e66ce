"""Static and signed 8-bit graphs: ranges from data, saturation, and what goes back into floating point."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress.quant import recording
from effformer.compress.quant.histogram import Histogram
from effformer.export import (
    Calibration,
    Session,
    calibrate_onnx,
    deviation,
    export_onnx,
    quantize_onnx,
    quantize_onnx_within,
    read_graph,
)
from effformer.export import quantize as module
from effformer.export.within import quantize_form
from torch import Tensor, nn


def data(count: int = 6) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    return [{"input": torch.randn(5, 64, generator=draws)} for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 8))
    return made.eval()


@pytest.fixture(scope="module")
def dense(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("static") / "dense.onnx"
    export_onnx(model, path, data()[0]["input"], verify=False)
    return path


def test_ranges_are_those_of_what_the_products_are_given(dense: Path, model: Any) -> None:
    found = calibrate_onnx(dense, data(), range="minmax")
    assert (found.rule, found.batches, len(found.ranges)) == ("minmax", 6, 2)
    first, second = Histogram(), Histogram()
    for batch in data():
        first.add(batch["input"])
        with torch.no_grad():
            second.add(model[1](model[0](batch["input"])))
    for ends, seen in zip(found.ranges.values(), (first, second), strict=True):
        assert ends == pytest.approx((seen.low, seen.high), rel=1e-5)
    inner = calibrate_onnx(dense, data(), percentile=0.9)
    assert next(iter(inner.ranges.values())) == pytest.approx(first.range("percentile", 90.0))
    whole = torch.cat([batch["input"] for batch in data()])
    again = calibrate_onnx(dense, {"input": whole}, percentile=0.9)  # cut into other batches
    for name, ends in inner.ranges.items():  # up to a bin, if a value lies between two
        assert again.ranges[name] == pytest.approx(ends, abs=0.01)
    with recording(model) as calls:
        for batch in data():
            model(batch["input"])
    assert calibrate_onnx(dense, calls, percentile=0.9).ranges == inner.ranges


@pytest.mark.parametrize("scheme", ["static-int8", "static-uint8", "dynamic-int8"])
def test_activations_and_weights_in_bytes(
    scheme: Any, dense: Path, model: nn.Module, tmp_path: Path
) -> None:
    given = {"data": data()} if scheme.startswith("static") else {}
    report = quantize_onnx(dense, tmp_path / "q.onnx", scheme, **given)  # type: ignore[arg-type]
    assert (report.scheme, report.quantized, report.left) == (scheme, 2, ())
    assert report.ratio < 0.4
    x = data(9)[-1]["input"]
    expected = model(x).detach()
    (made,) = Session(tmp_path / "q.onnx").run({"input": x}).values()
    assert (torch.from_numpy(made) - expected).norm() < 0.04 * expected.norm()
    kinds = read_graph(tmp_path / "q.onnx").operators
    assert kinds.get("QuantizeLinear", 0) == (2 if scheme.startswith("static") else 0)


def weights(path: Path) -> Iterator[Tensor]:
    import onnx
    from onnx import numpy_helper

    for tensor in onnx.load(path).graph.initializer:
        if tensor.name.endswith("_quantized"):
            yield torch.from_numpy(numpy_helper.to_array(tensor).copy())


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_the_processor_decides_about_signs_and_bits(
    scheme: Any, dense: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"data": calibrate_onnx(dense, data())} if scheme == "static" else {}
    found = {}
    for wide in (True, False):
        monkeypatch.setattr(module, "_adds_wide", lambda wide=wide: wide)
        report = quantize_onnx(dense, tmp_path / "q.onnx", scheme, force=True, **given)
        found[wide, "auto"] = report.scheme, max(int(w.max()) for w in weights(tmp_path / "q.onnx"))
        signed: Any = f"{scheme}-int8"
        for narrow in ("auto", True, False):
            quantize_onnx(
                dense, tmp_path / "q.onnx", signed, reduce_range=narrow, force=True, **given
            )
            found[wide, str(narrow), "int8"] = max(
                int(w.abs().max()) for w in weights(tmp_path / "q.onnx")
            )
    assert found[True, "auto"][0] == f"{scheme}-int8"
    assert found[False, "auto"] == (f"{scheme}-uint8", 255)
    assert found[True, "auto", "int8"] == found[False, "False", "int8"] == 127
    assert found[False, "auto", "int8"] == found[True, "True", "int8"] == 64


def test_signed_bytes_do_not_saturate_in_a_session(tmp_path: Path) -> None:
    """255 * 127 * 2 is more than 16 bits hold, whichever instructions the processor has."""
    model = nn.Linear(64, 8, bias=False)
    nn.init.constant_(model.weight, 1.0)
    x = torch.ones(3, 64)
    export_onnx(model, tmp_path / "d.onnx", x, verify=False)
    quantize_onnx(tmp_path / "d.onnx", tmp_path / "q.onnx", "dynamic-int8", reduce_range=False)
    (made,) = Session(tmp_path / "q.onnx").run({"input": x}).values()
    torch.testing.assert_close(torch.from_numpy(made), torch.full((3, 8), 64.0), rtol=0.01, atol=0)


def test_products_that_bear_static_ranges_badly_go_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 8)).eval()
    with torch.no_grad():  # one channel stretches the range of all
        model[0].weight[3] *= 400
    path, out = tmp_path / "d.onnx", tmp_path / "q.onnx"
    export_onnx(model, path, data()[0]["input"], verify=False)
    measure = deviation(path, data())
    assert measure(Session(path)) == 0.0
    all_of_them = quantize_onnx(path, out, "static-uint8", data=data())
    bad = measure(Session(out))
    limit = 0.5 * bad
    found = quantize_onnx_within(
        path, out, measure, "static-uint8", data=iter(data()), max_drop=limit, best="low"
    )
    assert 0 < len(found.back) < all_of_them.quantized == 3
    assert measure(Session(out)) == pytest.approx(found.metric)
    assert found.metric <= limit
    report = quantize_form(path, out, "static-uint8", data=data(), max_error=limit, force=True)
    assert report.left == tuple(one.name for one in found.back)


def test_what_is_refused(dense: Path, model: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    with pytest.raises(ValueError, match="static schemes take ranges from data"):
        quantize_onnx(dense, out, "static-int8")
    with pytest.raises(ValueError, match="data means nothing to 'dynamic-uint8'"):
        quantize_onnx(dense, out, data=data())
    with pytest.raises(ValueError, match="there are no samples"):
        calibrate_onnx(dense, [])
    with pytest.raises(ValueError, match=r"batch 0: input 'input' of the graph is missing; it has"):
        calibrate_onnx(dense, {"x": torch.ones(2, 64)})
    with pytest.raises(ValueError, match="2 of 128 values of input are NaN or infinite"):
        calibrate_onnx(
            dense, {"input": torch.ones(2, 64).index_fill(1, torch.tensor([3]), torch.nan)}
        )
    with pytest.raises(ValueError, match=r"batch 1 does not fit the graph: .*Got: 63"):
        calibrate_onnx(dense, [data()[0], {"input": torch.ones(2, 63)}])
    with pytest.raises(ValueError, match="becomes NaN or infinite on these data"):
        calibrate_onnx(dense, {"input": torch.full((2, 64), 3e38)})
    with pytest.raises(ValueError, match="range: unknown value 'max'"):
        calibrate_onnx(dense, data(), range="max")  # type: ignore[arg-type]
    other = Calibration(ranges={"x": (0.0, 1.0)}, rule="minmax", batches=1)
    with pytest.raises(ValueError, match="no range of 'input'; the calibration is that of another"):
        quantize_onnx(dense, out, "static-int8", data=other)
    quantize_onnx(dense, out, "static-int8", data=data())
    with pytest.raises(ValueError, match=r"no product of its .* nodes has a stored weight"):
        calibrate_onnx(out, data())
    half = tmp_path / "half.onnx"
    export_onnx(nn.Linear(64, 8).half(), half, torch.ones(2, 64).half(), verify=False)
    with pytest.raises(ValueError, match="has a stored weight in float32"):
        quantize_onnx(half, out, "static-int8", data={"input": torch.ones(2, 64).half()})
