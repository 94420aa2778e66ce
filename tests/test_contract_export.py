"""Every registered part exports to ONNX and agrees with torch at other shapes, batch 1 included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contract import (
    BLOCKS,
    DIM,
    FFNS,
    HEADS,
    MIXERS,
    caps_of,
    context_for,
    make_block,
    make_ffn,
    make_mixer,
    mixers,
)
from effformer.export import ExportError, Session, export_onnx
from torch import Tensor, nn

from effformer import registry
from effformer.config import resolve
from effformer.site import Site

CONDS = {"never": [False], "optional": [False, True], "always": [True]}
FORMS = [(n, False) for n in MIXERS if caps_of(n).onnx]
FORMS += [(n, True) for n in mixers(causal=True, onnx=True)]
PLAIN = ("linear", "performer")
"""Causal forms whose chunks do not become nodes of ONNX Runtime, or not in all graphs."""
BLOCK_FORMS = [(n, c) for n in BLOCKS for c in CONDS[registry.block.get(n).caps.cond]]


class _Alone(nn.Module):
    """A part with the context that a model would pass."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, context_for(self.part, x))


FIXED = {"tdsm"}
"""Mixers whose graphs serve one number of tokens: permutations are constants."""

LENGTHS = (1, 7, 33, 150, 300)
"""Below and above every default chunk; 7 is that of the trace."""


def _exports(part: nn.Module, folder: Path, *, fixed: bool = False) -> None:
    fixed = fixed or part.site.length is not None
    axes = {0: "batch"} if fixed else {0: "batch", 1: "tokens"}
    x = torch.randn(2, 11, part.site.dim)
    report = export_onnx(_Alone(part), folder / "part.onnx", (x,), dynamic={"x": axes})
    assert report.parity is not None
    assert len(report.parity.cases) >= 3
    assert report.parity.passed


def _serves_every_length(part: nn.Module, folder: Path, target: str = "onnx-cpu") -> None:
    """One graph, traced with few tokens, gives what the part gives at any number of them."""
    alone, axes = _Alone(part), {"x": {0: "batch", 1: "tokens"}}
    inputs, path = torch.randn(2, 7, part.site.dim), folder / "part.onnx"
    report = export_onnx(alone, path, inputs, dynamic=axes, target=target, verify=False)
    session = Session(path, threads=1)
    most = getattr(getattr(part, "core", None), "tokens", part.site.length or max(LENGTHS))
    assert report.conditions == ()
    assert all(end in (None, most) for _, end in report.ranges.values())
    for n in (n for n in LENGTHS if n <= most):
        x = torch.randn(3 if n > 7 else 1, n, part.site.dim)
        with torch.no_grad():
            expected = alone(x)
        found = torch.from_numpy(session.run({"x": x})["output"])
        assert found.shape == expected.shape == (len(x), n, part.site.dim)
        atol = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize(("name", "causal"), [form for form in FORMS if form[0] not in FIXED])
def test_mixers_serve_every_length(name: str, causal: bool, tmp_path: Path) -> None:
    _serves_every_length(make_mixer(name, causal=causal), tmp_path)


@pytest.mark.parametrize("name", sorted(n for n, c in FORMS if c and n in PLAIN))
def test_so_do_graphs_of_standard_operators(name: str, tmp_path: Path) -> None:
    _serves_every_length(make_mixer(name, causal=True), tmp_path, target="onnx")


@pytest.mark.parametrize("name", ["longformer", "nystrom", "topk"])
def test_so_do_wide_windows(name: str, tmp_path: Path) -> None:
    config = resolve("attention", name)
    part = config.build(Site(dim=DIM, heads=HEADS)).eval()
    _serves_every_length(part, tmp_path)


@pytest.mark.parametrize("name", sorted(FIXED))
def test_a_fixed_length_is_exported_or_named_as_the_reason(name: str, tmp_path: Path) -> None:
    part = make_mixer(name)
    _exports(part, tmp_path, fixed=True)
    with pytest.raises(ExportError, match=r"serves 11 'tokens' only.*leave that axis out"):
        _exports(part, tmp_path)


@pytest.mark.parametrize("name", FFNS)
def test_ffns(name: str, tmp_path: Path) -> None:
    _exports(make_ffn(name), tmp_path)


@pytest.mark.parametrize(("name", "cond"), BLOCK_FORMS)
def test_blocks(name: str, cond: bool, tmp_path: Path) -> None:
    _exports(make_block(name, cond=cond), tmp_path)
