"""What an earlier version saved still loads, and computes what it computed then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.export import open_bundle
from effformer.export.run import Bundle
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import effformer
from effformer.checks import CapabilityError
from effformer.cli import main
from effformer.train import read_checkpoint, read_metrics

# folders with retired spellings are read as what these became, with a warning
pytestmark = pytest.mark.filterwarnings("ignore::effformer.retired.RetiredWarning")

SAVED = Path(__file__).parent / "saved"
REFUSED = "macaron-postnorm-cross-flow"
MODELS = sorted(p for p in (SAVED / "models").iterdir() if p.is_dir() and p.name != REFUSED)


def example(folder: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs by name, and outputs in order."""
    stored = load_file(folder / "example.safetensors")
    inputs = {k.removeprefix("in."): v for k, v in stored.items() if k.startswith("in.")}
    return inputs, [stored[f"out.{i}"] for i in range(len(stored) - len(inputs))]


def run(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """What the model of a folder computes, and what it computed when it was saved."""
    inputs, expected = example(folder)
    with torch.no_grad():
        out: Any = effformer.load_model(folder)(**inputs)
    out = [out] if isinstance(out, Tensor) else [x for x in out if isinstance(x, Tensor)]
    return out, expected


@pytest.mark.parametrize("folder", MODELS, ids=[p.name for p in MODELS])
def test_models(folder: Path) -> None:
    assert_close(*run(folder), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("folder", MODELS, ids=[p.name for p in MODELS])
def test_models_are_saved_again_as_they_are(folder: Path, tmp_path: Path) -> None:
    model = effformer.load_model(folder)
    again = effformer.load_model(effformer.save_pretrained(model, tmp_path / "again"))
    assert (again.config, again.name) == (model.config, model.name)
    assert again.name == json.loads((folder / "config.json").read_text())["name"]
    before, now = load_file(folder / "model.safetensors"), model.state_dict()
    assert sum(v.numel() for v in before.values()) == sum(v.numel() for v in now.values())


def test_a_decoder_that_saw_later_tokens_is_refused() -> None:
    """The queries of Flow-Attention compete for the memory, so that each one saw those behind it."""
    with pytest.raises(CapabilityError, match="'flow' lets queries compete for the memory"):
        effformer.load_model(SAVED / "models" / REFUSED)


def test_every_family_was_saved() -> None:
    saved = {json.loads((p / "config.json").read_text())["family"] for p in MODELS}
    assert saved == {
        "bert", "dit", "dydit", "factformer", "flowformer-gpt", "flowformer-series",
        "flowformer-vision", "ifactformer", "lightningdit", "lmu-sequence", "lmuformer", "macaron",
        "macaron-bert", "predformer", "relactrl", "sit", "spiking-lmuformer", "vit",
    }  # fmt: skip


def test_a_run_goes_on(tmp_path: Path) -> None:
    """It stopped after step 3 of 6; ``end`` is what the whole run left.

    Weights whose gradient is zero but for rounding (biases of keys) go anywhere, so the function
    is compared.
    """
    folder = tmp_path / "run"
    shutil.copytree(SAVED / "run", folder)
    words = (
        "train sit-nano --set depth=1 --set dim=8 --steps 6 --batch 8 --warmup 2 --save-every 3 "
        "--train ema=0.9 --threads 1 --resume --json -o"
    )
    result = CliRunner().invoke(main.app, [*words.split(), str(folder)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["resumed"] == 3
    assert read_checkpoint(folder)[1]["step"] == 6
    now, then = read_metrics(folder)[-1], read_metrics(SAVED / "end")[-1]
    for key in ("loss", "lr", "grad_norm"):
        assert now[key] == pytest.approx(then[key], rel=1e-4), key
    shutil.copy(SAVED / "end" / "example.safetensors", folder / "model")
    assert_close(*run(folder / "model"), rtol=1e-3, atol=1e-3)


def test_a_bundle_samples() -> None:
    bundle = Bundle(SAVED / "bundle")
    bundle.self_test()
    assert bundle.sample([0, 1], seed=0).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("kind", ["texts", "streams"])
def test_bundles_of_other_kinds(kind: str) -> None:
    assert open_bundle(SAVED / kind).self_test() < 1e-4
