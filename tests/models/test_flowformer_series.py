"""Flowformer on time series: the published size, masks, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effformer.models.flowformer_series import FlowformerSeries

import effformer

TINY: dict[str, Any] = {
    "dim": 16, "depth": 2, "heads": 2, "ffn": {"hidden": 16}, "channels": 3, "length": 10,
    "num_classes": 4,
}  # fmt: skip


def build(**overrides: Any) -> FlowformerSeries:
    model = effformer.build_model("flowformer-series", **{**TINY, **overrides})
    assert isinstance(model, FlowformerSeries)
    return model.eval()


def test_published_shape() -> None:
    with torch.device("meta"):
        config = effformer.build_model("flowformer-series").config
    assert (config.dim, config.heads, config.depth, config.ffn.hidden) == (512, 8, 3, 512)
    assert config.attn.core.clamp is None


@pytest.mark.parametrize("attn", ["flow", "softmax", "linear"])
def test_padding_changes_nothing(attn: str) -> None:
    model, x = build(attn=attn), torch.randn(2, 10, 3)
    mask = torch.arange(10) < torch.tensor([[10], [6]])
    other = torch.where(mask.unsqueeze(-1), x, 100 * torch.randn(2, 10, 3))
    torch.testing.assert_close(model(other, mask), model(x, mask), rtol=1e-4, atol=1e-5)
    full = model(x, torch.ones(2, 10, dtype=torch.bool))
    torch.testing.assert_close(full, model(x), rtol=1e-4, atol=1e-5)


def test_bad_input_and_configs() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 10, 3\), got \(1, 9, 3\)"):
        build()(torch.zeros(1, 9, 3))
    with pytest.raises(ValueError, match=r"mask: expected shape \(B, length\), got \(1, 9\)"):
        build()(torch.zeros(1, 10, 3), torch.ones(1, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        build(length=0)
