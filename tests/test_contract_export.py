"""Mixers with large windows, of other targets, and of one length export to ONNX; that every part does is in
the contract."""

from __future__ import annotations

from pathlib import Path

import pytest
from contract import DIM, HEADS, make_mixer
from effformer.export import ExportError

from effformer.config import resolve
from effformer.site import Site
from effformer.testing.work import exports, serves_every_length

PLAIN = ("linear", "performer")
"""Causal forms whose chunks do not become nodes of ONNX Runtime, or not in all graphs."""


FIXED = {"tdsm"}
"""Mixers whose graphs serve one number of tokens: permutations are constants."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_so_do_graphs_of_standard_operators(name: str, tmp_path: Path) -> None:
    serves_every_length(make_mixer(name, causal=True), tmp_path, target="onnx")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("longformer", "nystrom", "topk")]
)
def test_so_do_wide_windows(name: str, tmp_path: Path) -> None:
    config = resolve("attention", name)
    part = config.build(Site(dim=DIM, heads=HEADS)).eval()
    serves_every_length(part, tmp_path)


@pytest.mark.parametrize("name", sorted(FIXED))
def test_a_fixed_length_is_exported_or_named_as_the_reason(name: str, tmp_path: Path) -> None:
    part = make_mixer(name)
    exports(part, tmp_path, fixed=True)
    with pytest.raises(ExportError, match=r"serves 11 'tokens' only.*leave that axis out"):
        exports(part, tmp_path)
