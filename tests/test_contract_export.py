"""Every registered part exports to ONNX and agrees with torch at other shapes, batch 1 included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contract import (
    BLOCKS,
    FFNS,
    MIXERS,
    caps_of,
    context_for,
    make_block,
    make_ffn,
    make_mixer,
    mixers,
)
from effformer.export import ExportError, export_onnx
from torch import Tensor, nn

from effformer import registry

CONDS = {"never": [False], "optional": [False, True], "always": [True]}
FORMS = [(n, False) for n in MIXERS if caps_of(n).onnx]
FORMS += [(n, True) for n in mixers(causal=True, onnx=True)]
BLOCK_FORMS = [(n, c) for n in BLOCKS for c in CONDS[registry.block.get(n).caps.cond]]


class _Alone(nn.Module):
    """A part with the context that a model would pass."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, context_for(self.part, x))


# the running stabilizer of causal Performer walks over chunks: its graph serves one length
# TDSM's permutations are constants of one number of tokens
ONE_LENGTH = {("performer", True), ("tdsm", False)}


def _exports(part: nn.Module, folder: Path, *, fixed: bool = False) -> None:
    fixed = fixed or part.site.length is not None
    axes = {0: "batch"} if fixed else {0: "batch", 1: "tokens"}
    x = torch.randn(2, 11, part.site.dim)
    report = export_onnx(_Alone(part), folder / "part.onnx", (x,), dynamic={"x": axes})
    assert report.parity is not None
    assert len(report.parity.cases) >= 3
    assert report.parity.passed


@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_mixers(name: str, causal: bool, tmp_path: Path) -> None:
    _exports(make_mixer(name, causal=causal), tmp_path, fixed=(name, causal) in ONE_LENGTH)


@pytest.mark.parametrize(("name", "causal"), sorted(ONE_LENGTH))
def test_a_fixed_length_is_named_as_the_reason(name: str, causal: bool, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="specialized it to be a constant"):
        _exports(make_mixer(name, causal=causal), tmp_path)


@pytest.mark.parametrize("name", FFNS)
def test_ffns(name: str, tmp_path: Path) -> None:
    _exports(make_ffn(name), tmp_path)


@pytest.mark.parametrize(("name", "cond"), BLOCK_FORMS)
def test_blocks(name: str, cond: bool, tmp_path: Path) -> None:
    _exports(make_block(name, cond=cond), tmp_path)
