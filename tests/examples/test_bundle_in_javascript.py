"""The example in JavaScript draws what the runner draws of the same noise. Needs node, and onnxruntime-web:
`npm install onnxruntime-web` here, or its folder in $ONNXRUNTIME_WEB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from effformer.export import export_bundle
from effformer.export.run import Bundle
from page_noise import normal

import effformer

EXAMPLE = Path(__file__).parents[2] / "examples" / "bundle_in_javascript.mjs"
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", "node_modules/onnxruntime-web")).resolve()


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("node") is None or not (RUNTIME / "package.json").is_file(),
    reason="needs node and onnxruntime-web: npm install onnxruntime-web, or its folder in $ONNXRUNTIME_WEB",
)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_it_draws_what_the_runner_draws(guidance: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = effformer.build_model(
        "sit-nano", input_size=8, channels=1, num_classes=10, learn_sigma=False, depth=1
    ).eval()
    torch.nn.init.normal_(model.final.linear.weight, std=0.5)  # zero until it is trained
    export_bundle(model, tmp_path / "bundle", steps=3, guidance=guidance)
    module = (RUNTIME / "dist/ort.node.min.mjs").as_uri()
    done = subprocess.run(
        ["node", str(EXAMPLE), "bundle", "3"], cwd=tmp_path, capture_output=True, text=True,
        check=False, env=os.environ | {"RUNTIME": module},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    actual = np.fromfile(tmp_path / "digit.f32", dtype="<f4").reshape(1, 1, 8, 8)
    expected = Bundle(tmp_path / "bundle").sample([3], noise=normal(0, 64).reshape(1, 1, 8, 8))
    assert_close(torch.from_numpy(actual), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    assert [len(line) for line in done.stdout.splitlines()] == [16] * 8
