"""Adaptive ViT: the pieces of the example, and the whole of it on the packaged digits."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from effformer.train import load_data

MNIST = "EFFFORMER_MNIST"
"""Environment variable with a folder of MNIST's IDX files."""


def test_pieces_fit_together(example: ModuleType) -> None:
    data = load_data("digits").subset(torch.arange(80))
    steps = example.Steps(dense=1, distil=3, gates=2, finetune=3)
    dense = example.build(data)
    model = example.finetune(example.adapt(dense, data, steps), data, 0.5, steps)
    assert 0 < example.executed_share(model, data) < 1
    counts = example.learners_per_patch(model, data["x"][:6])
    assert counts.shape == (6, 4, 4)
    assert 0 <= float(counts.min()) <= float(counts.max()) <= 4
    more = example.build(data)
    assert sum(p.numel() for p in more.parameters()) == sum(p.numel() for p in dense.parameters())


def test_the_share_is_that_of_the_gates(example: ModuleType) -> None:
    data = load_data("digits").subset(torch.arange(40))
    model, _ = example.acmize(
        example.build(data), example.AdaptiveScheme(projections=False, learners=4)
    )
    for block in model.blocks:
        gate = block.ffn.part.learners.gate
        torch.nn.init.zeros_(gate.net[-1].weight)
        gate.net[-1].bias.data = torch.tensor([0.0, 0, 1, 0, 0])  # everything runs 2 of 4
    share, ffn = example.executed_share(model, data), model.blocks[0].ffn.part
    own = ffn.learners.gate.macs(1)
    assert share == pytest.approx((own + 2 * ffn.learners.cost) / (own + 4 * ffn.learners.cost))
    assert (example.learners_per_patch(model, data["x"][:2]) == 2).all()


@pytest.mark.slow
def test_a_quick_run_draws(example: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "new" / "acm.png"
    result = example.main(["--quick", "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert 0 < result["executed"] < 1
    with pytest.raises(FileNotFoundError, match="does not exist"):
        example.main(["--data", str(tmp_path / "nowhere")])


@pytest.mark.slow
def test_digits(example: ModuleType, tmp_path: Path) -> None:
    result = example.main(["--out", str(tmp_path / "acm.png")])
    assert result["dense"] >= 0.95
    assert result["executed"] <= 0.58
    assert result["accuracy"] >= result["dense"] - 0.009


@pytest.mark.slow
def test_mnist(example: ModuleType, tmp_path: Path) -> None:
    folder = os.environ.get(MNIST)
    if folder is None:
        pytest.skip(f"needs MNIST's IDX files: set {MNIST} to their folder")
    result = example.main(["--data", folder, "--out", str(tmp_path / "acm.png")])
    assert result["dense"] >= 0.92
    assert result["executed"] <= 0.58
    assert result["accuracy"] >= result["dense"] - 0.009
    assert result["seconds"] < 300
