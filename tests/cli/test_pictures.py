"""A folder of pictures that are wider than high, from the files to a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from PIL import Image

from .running import answer, invoke, refusal

FEW = ("--steps", "2", "--batch", "4", "--warmup", "0")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, value in (("dark", 40), ("light", 220)):
        (folder / name).mkdir()
        for i in range(4):
            pixels = np.full((8, 12), value + i, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_rectangles_go_all_the_way(photos: Path, tmp_path: Path) -> None:
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    done = invoke("train", "sit-nano", "--data", str(photos), *FEW, "-o", str(run))
    assert "8 samples 1x8x12 of" in done.stderr
    assert "cut away" not in done.stderr
    assert answer("export", str(run), "-o", str(bundle))["parity"]["max_rel"] < 1e-4
    drawn = []
    for source in (run, bundle):
        file = tmp_path / f"{source.name}.npy"
        invoke("sample", str(source), "--labels", "dark,light", "--steps", "2", "-o", str(file))
        invoke("sample", str(source), "--labels", "dark", "--steps", "1", "-o", f"{file}.png")
        drawn.append(np.load(file))
    assert drawn[0].shape == (2, 1, 8, 12)
    one, other = map(torch.from_numpy, drawn)
    assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert "8x12 of" in invoke("train", "--resume", str(run)).stderr


def test_what_is_cut_is_said(photos: Path, tmp_path: Path) -> None:
    words = ("train", "sit-nano", "--data", str(photos), *FEW)
    done = invoke(*words, "--size", "8", "-o", str(tmp_path / "square"))
    assert "1x8x8 of" in done.stderr
    assert "up to 33% of an image cut away" in done.stderr
    done = invoke(*words, "--size", "4x6", "-o", str(tmp_path / "small"))
    assert "1x4x6 of" in done.stderr
    assert "cut away" not in done.stderr
    for size, message in (("0", "a side of 1"), ("4x", "24x32"), ("4x99999", "a side of 1")):
        assert message in refusal(*words, "--size", size, "-o", str(tmp_path / "no"))
    said = refusal(*words, "--size", "9x12", "-o", str(tmp_path / "no"))
    assert "input_size (9, 12) is not divisible by patch 2; patches that fit: 1, 3" in said


def test_square_layouts_refuse_rectangles(photos: Path, tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    invoke("build", "sit-nano", "--set", "input_size=[8, 12]", "-o", model)
    for layout in ("official", "diffusers"):
        said = refusal("convert", model, "--to", layout, "-o", str(tmp_path / "w.safetensors"))
        assert "has no input_size=(8, 12)" in said
