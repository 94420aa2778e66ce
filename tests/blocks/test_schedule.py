"""Schedules of axes, in any model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import effformer
from effformer.blocks import BackboneConfig, Needs, build_stack
from effformer.blocks.schedule import axes_of
from effformer.checks import CapabilityError
from effformer.site import Site

SITE = Site(dim=12, heads=3)


def views(grid: str, depth: int = 4, **config: Any) -> list[str]:
    """Axes of each block; the full grid has no view."""
    chosen = BackboneConfig.from_dict({"dim": 12, "depth": depth, "heads": 3, **config})
    blocks = build_stack(
        chosen, replace(SITE, grid=(None,) * len(grid) or None), Needs(), name="toy"
    )
    return [getattr(block.attn.part.config, "over", grid) for block in blocks]


@pytest.mark.parametrize(
    ("schedule", "grid", "expected"),
    [
        ("tsst", "thw", ["t", "hw", "hw", "t"]),
        ("TS", "thw", ["t", "hw", "t", "hw"]),
        ("f", "thw", ["thw"] * 4),
        ("thwf", "thw", ["t", "h", "w", "thw"]),
        ("hw", "hw", ["h", "w", "h", "w"]),
        ("s", "hw", ["hw"] * 4),
        ("", "hw", ["hw"] * 4),
    ],
)
def test_schedules(schedule: str, grid: str, expected: list[str]) -> None:
    assert views(grid, axes=schedule) == expected
    if schedule:
        assert axes_of(schedule, 4, grid, where="toy") == expected


def test_layers_change_the_mixer_inside_its_view() -> None:
    layers = {"1:": {"attn": "flow"}, "3": {"attn": {"name": "axes", "over": "tw"}}}
    config = BackboneConfig.from_dict(
        {"dim": 12, "depth": 4, "heads": 3, "axes": "ts", "layers": layers}
    )
    blocks = build_stack(config, replace(SITE, grid=(None,) * 3), Needs(), name="toy")
    mixers = [block.attn.part for block in blocks]
    assert [m.config.over for m in mixers] == ["t", "hw", "t", "tw"]
    cores = [m.mixer.core.config.to_dict()["name"] for m in mixers]
    assert cores == ["softmax", "flow", "flow", "flow"]


@pytest.mark.parametrize(
    ("schedule", "grid", "error", "message"),
    [
        ("tx", "thw", ValueError, r"toy axes: 'x' in 'tx' is no axis; choices: t, h, w, s"),
        ("tss", "thw", ValueError, r"toy axes: the 3 letters of 'tss' do not divide 4 blocks"),
        ("ts", "hw", CapabilityError, r"toy axes: 't' in 'ts': this model has only h, w"),
        ("h", "", CapabilityError, r"toy axes: 'h' in 'h': this model has no grid of tokens"),
    ],
)
def test_bad_schedules(schedule: str, grid: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        views(grid, axes=schedule)


def test_a_dit_mixes_rows_and_columns_in_turn(tmp_path: Path) -> None:
    model = effformer.build_model("dit-nano", input_size=8, attn="flow", axes="hw").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    inputs = model.example_inputs(2)
    out = model(**inputs)
    assert out.std() > 0
    effformer.save_pretrained(model, tmp_path / "m")
    loaded = effformer.load_model(tmp_path / "m")
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(**inputs), out, rtol=0, atol=0)


def test_a_class_token_sees_every_line() -> None:
    model = effformer.build_model("vit-nano", axes="hw").eval()
    x = model.example_inputs()["x"].requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x)
    assert grad.abs().amin(dim=1).gt(0).float().mean() > 0.99


def test_drop_path_rules() -> None:
    for rule, expected in (("linear", [0.0, 0.1, 0.2, 0.3]), ("uniform", [0.3] * 4)):
        config = BackboneConfig.from_dict(
            {"dim": 12, "depth": 4, "heads": 3, "drop_path": 0.3, "drop_path_rule": rule}
        )
        blocks = build_stack(config, SITE, Needs(), name="toy")
        assert [block.site.drop_path for block in blocks] == pytest.approx(expected)
