"""Where models run, and in which numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from effformer.cli.common import load, moved
from effformer.cli.forms import modelled

from .running import SMALL, answer, invoke, refusal

NOWHERE = ["meta", "xyz", "cpu:x", ""] + ["cuda"] * (not torch.cuda.is_available())


@pytest.mark.parametrize("device", NOWHERE)
@pytest.mark.parametrize("verb", ["profile", "bench", "sample", "evaluate", "train"])
def test_devices_that_are_not_here(verb: str, device: str, saved: Path, tmp_path: Path) -> None:
    words = {
        "sample": ["-o", str(tmp_path / "s.png")], "evaluate": ["--data", "digits"],
        "train": ["-o", str(tmp_path / "run")],
    }  # fmt: skip
    source = "sit-nano" if verb == "train" else str(saved)
    said = refusal(verb, source, "--device", device, *words.get(verb, []))
    assert f"--device {device}: cannot be used here (" in said
    assert said.endswith("cpu always can")
    assert len(said) < 250


def test_numbers_of_the_weights_decide(saved: Path, tmp_path: Path) -> None:
    whole, half = (
        answer("profile", "sit-nano", *SMALL, *words) for words in ([], ["--dtype", "float16"])
    )
    assert half["total"] == whole["total"]
    assert half["memory"]["peak"] < whole["memory"]["peak"]
    drawn = []
    for kind in ("float32", "bfloat16"):
        file = tmp_path / f"{kind}.npy"
        invoke("sample", str(saved), "--dtype", kind, "--steps", "2", "-o", str(file))
        drawn.append(np.load(file))
    assert drawn[1].dtype == np.float32
    assert 0 < np.abs(drawn[0] - drawn[1]).max() < 0.2


def test_what_is_timed_has_the_numbers(saved: Path, tmp_path: Path) -> None:
    from effformer.cli.forms import keep_inputs

    model = moved(load(str(saved)), "cpu", "bfloat16")
    place = keep_inputs(model.example_inputs(2), tmp_path / "inputs.safetensors")
    assert (
        modelled(str(saved), str(place), {}, "eager", "cpu", "bfloat16")().dtype == torch.bfloat16
    )


def test_timings_say_where(saved: Path) -> None:
    few = ["--rounds", "1", "--runs", "1", "--warmup", "0", "--threads", "1"]
    (row,) = answer("bench", str(saved), "--dtype", "bfloat16", *few)["rows"]
    assert (row["latency"]["dtype"], row["latency"]["device"]) == ("bfloat16", "cpu")
    for words in (["--forms", "all"], ["--forms", "eager,onnx"]):
        said = refusal("bench", str(saved), *words, "--dtype", "bfloat16")
        assert "onnx runs on the CPU" in said
        assert "for --forms eager,optimized,compiled" in said
