"""Every registered part in every slot of every family: it runs, or it is refused when the model is
built, with the names of parts that fit.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effformer.blocks import Block, Branch
from effformer.build import build_model
from effformer.checks import CapabilityError
from effformer.registry import model as models
from effformer.testing.matrix import (
    Built,
    Column,
    Refusal,
    build,
    columns,
    families,
    fit,
    names,
    slots,
)

FAMILIES = families()


def _columns() -> list[Column]:
    """Families without a small model are left out: `test_every_family_has_a_small_model` fails."""
    every = []
    for family in FAMILIES:
        try:
            every += columns(family)
        except ValueError:
            continue
    return every


COLUMNS = _columns()
CELLS = [
    pytest.param(column, slot, name, id=f"{column.title}-{slot}-{name}".replace(", ", "-"))
    for column in COLUMNS
    for slot, kind in slots(column).items()
    for name in names(kind)
]
MASKED = {
    "bert": "mask", "flowformer-series": "mask", "macaron-bert": "mask", "joint-dit": "text_mask",
    "flux": "text_mask", "mmdit": "text_mask",
}  # fmt: skip
"""Families whose parts must honour key masks, and the name of the mask: they get a ragged batch."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_small_model(family: str) -> None:
    for column in columns(family):
        assert models.get(column.preset).facts["family"] == family
        size = sum(p.numel() for p in _plain(column).parameters())
        assert size < 1_000_000, f"{column.title}: {size:,} parameters are too many for a test"


def test_a_family_without_a_small_model_is_told_what_to_add() -> None:
    with pytest.raises(
        ValueError, match=r"register a preset 'sonnet-tiny' .* to SMALL in effformer/"
    ):
        columns("sonnet")


@pytest.mark.parametrize(("column", "slot", "name"), CELLS)
def test_a_part_runs_or_is_refused_at_build_time(column: Column, slot: str, name: str) -> None:
    result = fit(column.preset, column.title, slot, name)
    if isinstance(result, Refusal):
        for other in result.choices:
            assert isinstance(fit(column.preset, column.title, slot, other), Built), (
                f"{column.title}.{slot}: {name!r} is refused and {other!r} offered, "
                "which is refused as well"
            )
        return
    model = build(column, slot, name, result.options)
    _learns(model, column)


@pytest.mark.parametrize(
    "message",
    ["no", "vit blocks[0:2].attn: 'flow' is not causal", "'flow' is bad; choices: linear"],
)
def test_refusals_without_place_or_choices_are_found(message: str) -> None:
    with pytest.raises(ValueError, match="a refusal at build time reads"):
        Refusal.parse(message)


def test_refusals_are_read() -> None:
    message = "m encoder blocks[0:2].attn: 'flow' is: odd; give it 1; choices: linear, top-k"
    assert Refusal.parse(message) == Refusal("is: odd; give it 1", ("linear", "top-k"))


PACKING = [
    c
    for c in COLUMNS
    if "packed" in inspect.signature(models.get(c.preset).build.forward).parameters
]


@pytest.mark.parametrize(
    ("column", "slot"),
    [pytest.param(c, slot, id=f"{c.title}-{slot}") for c in PACKING for slot in slots(c)],
)
def test_packed_rows_run_or_are_refused_with_choices(column: Column, slot: str) -> None:
    """Models pack on request, so a part that cannot is refused when it is asked to."""
    refused, able = {}, {"multihead"}
    for name in names(slots(column)[slot]):
        result = fit(column.preset, column.title, slot, name)
        if not isinstance(result, Built):
            continue
        model = _stirred(build(column, slot, name, result.options)).eval()
        inputs = _inputs(model, column)
        try:
            packed = model(**inputs, packed=True)
        except CapabilityError as error:
            refused[name] = str(error).rpartition("choices that can: ")[2].split(", ")
            continue
        able.add(name)
        mask = inputs[MASKED.get(model.FAMILY, "mask")]
        _agree(model(**inputs), packed, mask)
    if not refused and able == {"multihead"}:
        pytest.skip("no part for this slot can be built into this model")
    assert able > {"multihead"}
    for name, choices in refused.items():
        assert set(choices) <= able, name


def _agree(padded: Any, packed: Any, mask: Tensor) -> None:
    """Equal on real tokens; what stands on padding means nothing in a padded run."""
    pairs = [(padded, packed)] if isinstance(padded, Tensor) else zip(padded, packed, strict=True)
    for one, other in pairs:
        if one.shape[:2] == mask.shape:
            one, other = one[mask], other[mask]
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def _plain(column: Column) -> nn.Module:
    return build_model(column.preset, **column.changes)


def _stirred(model: nn.Module) -> nn.Module:
    """Weights away from what they start with, so that closed gates are open."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model


def _inputs(model: Any, column: Column) -> dict[str, Tensor]:
    """Two samples; where the model masks, one of them is padded."""
    inputs = model.example_inputs(2, generator=torch.Generator().manual_seed(0))
    if model.FAMILY in MASKED:
        name = MASKED[model.FAMILY]
        assert name in inspect.signature(model.forward).parameters
        masked = inputs["text"] if name == "text_mask" else next(iter(inputs.values()))
        inputs[name] = torch.ones(masked.shape[:2], dtype=torch.bool)
        inputs[name][0, -5:] = False
    if model.FAMILY == "macaron":
        inputs["source"][0, :5] = model.config.pad
    return inputs


def _learns(model: Any, column: Column) -> None:
    """Finite outputs, the same twice in evaluation; finite gradients that reach every block."""
    inputs = _inputs(_stirred(model), column)
    with torch.no_grad():
        first, again = (_flat(model.eval()(**inputs)) for _ in range(2))
    assert first.isfinite().all()
    assert torch.equal(first, again)
    out = _flat(model.train()(**inputs))
    (out * torch.randn_like(out)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in gradients.values())
    for path, part in _parts(model):
        own = [p for p in part.parameters() if p.requires_grad]
        assert not own or any(p.grad is not None and p.grad.any() for p in own), path


def _flat(out: Any) -> Tensor:
    """All results of a model in one row."""
    return torch.cat([x.flatten() for x in ((out,) if isinstance(out, Tensor) else out)])


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Blocks, and what stands in their branches."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, (Block, Branch))]
    return [(path, m.part if isinstance(m, Branch) else m) for path, m in found]
