"""The classifier with one memory unit: sizes, prefixes, streams, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effformer.models.lmu_sequence import PRESETS

import effformer

SPIKING = {"front": None, "pool": "last", "neurons": {"threshold": 0.1}}


def build(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return effformer.build_model("lmu-sequence-tiny", **overrides).eval()


@pytest.mark.parametrize(("name", "preset"), PRESETS.items())
def test_parameters_of_the_published_sizes(name: str, preset: Any) -> None:
    model = effformer.build_model(name)
    if preset.params is not None:
        assert sum(p.numel() for p in model.parameters()) == preset.params
    assert model.config == type(preset.config).from_dict(model.config.to_dict())


@pytest.mark.parametrize("pieces", [[1] * 40, [7, 30, 3]])
@pytest.mark.parametrize(
    "options", [{}, {"pool": "last"}, SPIKING, {"neurons": {"threshold": 0.1}}]
)
def test_streams(options: dict[str, Any], pieces: list[int]) -> None:
    model, x = build(**options), torch.rand(2, 40, 1) * 3
    expected = model.prefix_logits(x)
    torch.testing.assert_close(expected[:, -1], model(x))
    assert expected.std(dim=1).max() > 1e-4
    state, outputs = model.init_state(2), []
    for piece in x.split(pieces, dim=1):
        out, state = model.step(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_learns() -> None:
    for options in ({}, SPIKING):
        model = build(**options).train()
        model(torch.rand(4, 40, 1) * 3).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert model.unit.write.weight.grad.any()


def test_bad_input() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"x: expected shape \(B, N, 1\), got \(2, 40\)"):
        model(torch.rand(2, 40))
    with pytest.raises(ValueError, match="expected at least one step"):
        model(torch.rand(2, 0, 1))
    with pytest.raises(ValueError, match="streaming needs evaluation mode"):
        model.train().step(torch.rand(2, 1, 1), model.init_state(2))
    with pytest.raises(ValueError, match="front must be at least 1, got 0"):
        build(front=0)
    with pytest.raises(ValueError, match="hidden must be at least 1"):
        build(hidden=0)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\)"):
        build(dropout=1.0)
