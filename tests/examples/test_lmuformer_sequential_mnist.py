"""Row by row: the pieces of the example, and the whole of it on the packaged digits."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from effformer.train import load_data

MNIST = "EFFFORMER_MNIST"
"""Environment variable with a folder of MNIST's IDX files."""


def test_rows_are_frames(example: ModuleType) -> None:
    images = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    frames = example.rows(images)
    assert frames.shape == (2, 4, 15)
    for row in range(4):
        assert torch.equal(frames[:, row], images[:, :, row].flatten(1))


def test_streaming_gives_the_predictions_of_whole_images(example: ModuleType) -> None:
    data = load_data("digits").subset(torch.arange(60))
    model = example.build(data)
    example.fit(model, data, 20)
    whole, prefixes = example.parallel(model, data, 25), example.streamed(model, data, 25)
    assert prefixes.shape == (60, 8, 10)
    torch.testing.assert_close(prefixes[:, -1], whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prefixes[:, 3], whole, atol=1e-2)


def test_the_picture_is_drawn(example: ModuleType, tmp_path: Path) -> None:
    example.picture(tmp_path / "rows.png", torch.linspace(0.1, 1, 8), torch.rand(1, 8, 8))
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_did_not_learn_fails(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="recognised, fewer than 95%"):
        example.main(["--steps", "2", "--out", str(tmp_path / "rows.png")])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        example.main(["--data", str(tmp_path / "nowhere")])


@pytest.mark.slow
def test_digits_are_recognised(example: ModuleType, tmp_path: Path) -> None:
    result = example.main(["--out", str(tmp_path / "rows.png")])
    assert result["accuracy"] >= 0.96
    assert result["agree"] == 1


@pytest.mark.slow
def test_mnist_is_recognised(example: ModuleType, tmp_path: Path) -> None:
    folder = os.environ.get(MNIST)
    if folder is None:
        pytest.skip(f"needs MNIST's IDX files: set {MNIST} to their folder")
    result = example.main(["--data", folder, "--out", str(tmp_path / "rows.png")])
    assert result["accuracy"] >= 0.98
    assert result["seconds"] < 300
