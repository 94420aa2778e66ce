"""A bundle whose runner leaves blocks out, against torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cached_models import awake
from closeness import assert_close
from effformer.export import BundleReport, export_bundle
from effformer.export.run import Bundle, BundleError

from effformer.cache import cached
from effformer.flow import Guidance, adapt, sample

NEWTON: dict[str, Any] = {"name": "newton", "order": 2, "every": 3, "warm": 3}
LABELS = [0, 7, 1]


@pytest.fixture(scope="module")
def model() -> Any:
    return awake(std=0.2, channels=1, num_classes=10)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cached") / "bundle"
    return export_bundle(model, path, cache=NEWTON, convention="sit").folder


def test_the_second_graph_has_no_blocks(folder: Path) -> None:
    sizes = {name: (folder / name).stat().st_size for name in ("velocity.onnx", "light.onnx")}
    assert sizes["light.onnx"] < 0.5 * sizes["velocity.onnx"]
    facts = json.loads((folder / "bundle.json").read_text())
    assert facts["self_test"]["sample"]["steps"] == 8  # so many that some are skipped
    assert Bundle(folder).self_test() <= 1e-4


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_runner_skips_as_torch_does(
    sampler: str, guidance: float, folder: Path, model: Any
) -> None:
    noise = torch.randn(3, 1, 8, 8)
    rule = None if guidance == 1 else Guidance(guidance, null={"y": 10})
    given: dict[str, Any] = {"sampler": sampler, "steps": 10, "guidance": rule}
    bundle, y = Bundle(folder, threads=1), torch.tensor(LABELS)
    own: dict[str, Any] = {"sampler": sampler, "steps": 10, "guidance": guidance}
    own["noise"] = noise.numpy()
    full = sample(adapt(model), noise, **given, y=y).x
    for policy, asked in (
        (NEWTON, None), ({"name": "reuse", "every": 2}, {"every": 2, "warm": 0, "order": 0}),
    ):  # fmt: skip
        field = cached(adapt(model), policy)
        expected = sample(field, noise, **given, y=y).x
        assert 0 in field.computed
        actual = torch.from_numpy(bundle.sample(LABELS, **own, cache=asked))
        assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert (expected - full).norm() > (1e-3 if asked else 1e-4) * full.norm()
    for off in (False, {"every": 1}):
        actual = torch.from_numpy(bundle.sample(LABELS, **own, cache=off))
        assert_close(actual, full, rtol=1e-4, atol=1e-4)


def test_bundles_without_a_cache_say_so(bundle: BundleReport) -> None:
    with pytest.raises(BundleError, match="exported without a cache"):
        Bundle(bundle.folder).sample([0], cache={"every": 2})


def test_the_folder_runs_alone(folder: Path, tmp_path: Path) -> None:
    for words in ((), ("--no-cache",)):
        out = tmp_path / f"{len(words)}.npy"
        command = [
            sys.executable,
            str(folder / "run.py"),
            "--labels",
            "0,7",
            "--out",
            str(out),
            *words,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert not np.array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))


def test_wrong_words(folder: Path, model: Any, tmp_path: Path) -> None:
    bundle = Bundle(folder)
    for wrong, why in (
        ({"every": 0}, "every must be a whole number in 1"),
        ({"evry": 2}, "cache has no 'evry'"),
        ({"every": 2, "over": "attention"}, "over must be 'stack'"),
        ({"order": 1.5}, "order must be a whole number"),
    ):
        with pytest.raises(BundleError, match=why):
            bundle.sample(LABELS, cache=wrong)
    for policy in ("residual", {"name": "reuse", "over": "attention"}):
        with pytest.raises(ValueError, match="has no form in a bundle; choices: reuse and newton"):
            export_bundle(model, tmp_path / "b", cache=policy, convention="sit")
    assert not (tmp_path / "b").exists()
