from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from effformer.compress import quantize
from effformer.compress.report import file_bytes
from safetensors.torch import save_file
from torch import nn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.int64])
def test_file_bytes_is_the_size_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"a.b": torch.zeros(3, 5, dtype=dtype), "c": torch.zeros((), dtype=dtype)}
    save_file(state, tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert abs(file_bytes(state) - (tmp_path / "m.safetensors").stat().st_size) <= 16


def test_table_and_dict() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Conv2d(1, 2, 3))
    _, report = quantize(model, "int8")
    text = str(report)
    assert "0      int8                 32x64" in text
    assert "1      kept: Conv2d is not a linear layer or embedding (80 B)" in text
    assert "relative output error" not in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ratio"] == report.ratio
    assert (
        data["layers"][0]["ratio"] == report.layers[0].ratio == (32 * 64 + 32 * 4) / (32 * 64 * 4)
    )
    assert data["kept"][0]["kind"] == "Conv2d"
    assert "relative output error: 0." in str(
        quantize(model[:1], "int8", inputs=torch.ones(1, 64))[1]
    )


def test_a_zero_weight_has_no_error() -> None:
    dense = nn.Linear(8, 8)
    nn.init.zeros_(dense.weight)
    _, report = quantize(nn.Sequential(dense), "nf4", inputs=torch.ones(1, 8))
    assert report.layers[0].error == 0.0
    assert report.output_error == 0.0
