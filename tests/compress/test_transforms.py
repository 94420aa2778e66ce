"""Changes that a saved model remembers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress.transforms import forget, record, replay
from torch import nn

import effformer
from effformer import registry
from effformer.checks import FormatError


@pytest.fixture
def scale_transform() -> Iterator[None]:
    """A transform of a third party: an FFN with one more number."""

    def scale(model: nn.Module, facts: Mapping[str, Any]) -> nn.Module:
        part = model.get_submodule(facts["path"])
        part.register_buffer("scale", torch.ones(()))
        return model

    registry.transform.register("test-scale")(scale)
    yield
    del registry.transform._entries["test-scale"]
    del registry.transform._aliases["test-scale"]


@pytest.mark.usefixtures("scale_transform")
def test_a_registered_transform_is_replayed_before_the_weights_are_loaded(tmp_path: Path) -> None:
    model = effformer.build_model("vit-nano")
    facts = {"path": "blocks.0.ffn.part"}
    replay(model, {"kind": "test-scale", **facts})
    assert model.transforms == ({"kind": "test-scale", **facts},)
    model.get_submodule(facts["path"]).scale.fill_(3.0)
    effformer.save_pretrained(model, tmp_path / "m")
    loaded = effformer.load_model(tmp_path / "m")
    assert loaded.get_submodule(facts["path"]).scale.item() == 3.0
    assert loaded.transforms == model.transforms


def test_records_are_appended_and_forgotten_by_kind() -> None:
    model = nn.Linear(2, 2)
    record(model, "quantize", {"layers": ["a"]})
    record(model, "test-scale", {"path": "b"})
    record(model, "quantize", {"layers": ["c"]})
    assert [r["kind"] for r in model.transforms] == ["quantize", "test-scale", "quantize"]
    forget(model, "quantize")
    assert model.transforms == ({"kind": "test-scale", "path": "b"},)


@pytest.mark.parametrize("kind", ["test-scale", "", None, 3])
def test_unknown_kinds_name_the_known_ones(kind: object) -> None:
    with pytest.raises(
        FormatError, match=f"transform {kind!r}: unknown; known: 'lora', 'prune', 'quantize'"
    ):
        replay(nn.Linear(2, 2), {"kind": kind})


def test_loading_finds_transforms_without_compress(tmp_path: Path) -> None:
    """`load_model` asks the registry, which imports its home."""
    small, _ = effformer.compress.quantize(effformer.build_model("vit-nano"), "int8")
    effformer.save_pretrained(small, tmp_path / "m")
    code = (
        "import sys, effformer\n"
        f"model = effformer.load_model({str(tmp_path / 'm')!r})\n"
        "print(len(model.transforms))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "1"
