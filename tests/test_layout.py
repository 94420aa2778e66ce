from __future__ import annotations

import pytest
import torch

from effformer import registry
from effformer.layout import Rows, has_keys, renamed

LAYOUT = renamed(
    "theirs",
    [
        ("blocks.{i}.attn.part", "h.{i}.attention"),
        ("blocks.{i}.branch{j}", "h.{i}.branches.{j}"),
        ("embed.table", "wte"),
        ("scale", "scale"),
    ],
    recognise=has_keys("wte.weight"),
    rows=[
        Rows(
            ours=("blocks.{i}.qkv.{kind}",),
            theirs=tuple(f"h.{{i}}.{x}_proj.{{kind}}" for x in "qkv"),
        )
    ],
)


def state() -> dict[str, torch.Tensor]:
    keys = ["h.0.attention.fc.weight", "h.11.attention.fc.bias", "h.3.branches.2.w"]
    keys += ["wte.weight", "scale"]
    keys += [f"h.7.{x}_proj.weight" for x in "qkv"]
    return {key: torch.randn(2, 3) for key in keys}


def test_names_are_mapped_both_ways() -> None:
    theirs = state()
    ours = LAYOUT.to_ours(dict(theirs), None)
    assert set(ours) == {
        "blocks.0.attn.part.fc.weight",
        "blocks.11.attn.part.fc.bias",
        "blocks.3.branch2.w",
        "embed.table.weight",
        "scale",
        "blocks.7.qkv.weight",
    }
    assert ours["blocks.7.qkv.weight"].shape == (6, 3)
    back = LAYOUT.from_ours(ours, None)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


def test_prefixes_end_at_dots() -> None:
    ours = LAYOUT.to_ours({"wte2.weight": torch.zeros(1), "scale_factor": torch.zeros(1)}, None)
    assert set(ours) == {"wte2.weight", "scale_factor"}


def test_unknown_and_incomplete_keys_pass_to_be_reported() -> None:
    given = {"mystery": torch.zeros(1), "h.0.q_proj.weight": torch.zeros(2, 2)}
    assert set(LAYOUT.to_ours(dict(given), None)) == set(given)


def test_recognise() -> None:
    assert LAYOUT.recognise(state())
    assert not LAYOUT.recognise(["embed.table.weight"])


@pytest.mark.parametrize("family", sorted({e.facts["family"] for e in registry.model}))
def test_published_layouts_are_told_apart(family: str) -> None:
    entry = next(e for e in registry.model if e.facts["family"] == family)
    names = [layout.name for layout in entry.build.LAYOUTS]  # type: ignore[attr-defined]
    assert len(set(names)) == len(names)
    assert "effformer" not in names
