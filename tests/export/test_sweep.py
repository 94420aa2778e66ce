"""Whole models as graphs: every family, and every part in a model that takes it, at other sizes than
the traced one: the graph gives what the model gives, and refuses what the model refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import largest
from effformer.compress import quantize
from effformer.export import ExportError, Session, export_onnx
from effformer.export.inputs import Axes, graph_call, resized, resolve_axes, sizes
from effformer.export.lengths import Lengths, farther
from effformer.export.packed import step_of
from effformer.export.runs import shaken_runs
from torch import Tensor, nn

from effformer import registry
from effformer.build import build_model
from effformer.calls import Call
from effformer.checks import CapabilityError
from effformer.testing import matrix
from effformer.testing.matrix import Built, Column, columns, families, fit, slots

EVERY = [column for family in families() for column in columns(family)]
PARTS = [
    (kind, name)
    for kind in ("ffn", "block", "width", "tokens")
    for name in registry.KINDS[kind].names()
]
QUICK = ("bert-tiny", "lmu-sequence-tiny")
"""A graph with a mask and an end of its range, and one with a state."""
TOLERANCE = 1e-4
SHAKE = 2e-6
"""By how much weights are off, relative to themselves, where a model is asked for ties."""
DRAWS = 8
TURNS = 16
_REFUSALS = (ValueError, RuntimeError, AssertionError, IndexError)


def _ids(column: Column) -> str:
    return column.title.replace(", ", "-")


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(c, id=_ids(c), marks=[] if c.preset in QUICK else pytest.mark.slow)
        for c in EVERY
    ],
)
def test_every_family(column: Column, tmp_path: Path) -> None:
    _serves(_stirred(build_model(column.preset, **column.changes)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_part_in_a_model(kind: str, name: str, tmp_path: Path) -> None:
    _serves(_stirred(_with(kind, name)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", registry.quantizer.names())
def test_packed_weights(scheme: str, tmp_path: Path) -> None:
    """Every format in another model."""
    column = EVERY[3 * registry.quantizer.names().index(scheme) % len(EVERY)]
    model = _stirred(build_model(column.preset, **column.changes))
    _serves(quantize(model, scheme, data=model.example_inputs(2))[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("column", EVERY[::3], ids=_ids)
def test_float16(column: Column, tmp_path: Path) -> None:
    _serves(_stirred(build_model(column.preset, **column.changes)).half(), tmp_path)


def _with(kind: str, name: str) -> nn.Module:
    """A model with a part, each part in another one of those that take it."""
    able = []
    for column in EVERY:
        for slot, of in slots(column).items():
            if of == kind:
                result = fit(column.preset, column.title, slot, name)
                if isinstance(result, Built):
                    able.append((column, slot, result.options))
    assert able, f"no small model takes the {kind} {name!r}"
    column, slot, options = able[PARTS.index((kind, name)) % len(able)]
    return matrix.build(column, slot, name, options)


def _stirred(model: nn.Module) -> nn.Module:
    """Weights away from what they start with, so that closed gates are open; fixed tables stay."""
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad or not p.any()):
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval()


def _serves(model: nn.Module, folder: Path) -> None:
    half = next((p.dtype for p in model.parameters() if p.dtype is torch.float16), None)
    call = graph_call(model, _inputs(model, half), where="sweep")
    axes = resolve_axes(model, call, "auto", where="sweep")
    try:
        report = export_onnx(model, folder / "m.onnx", call.kwargs, tolerance=TOLERANCE)
    except (CapabilityError, ExportError) as error:
        pytest.skip(str(error))
    assert report.parity is not None
    assert not report.parity.constant
    session, draws = Session(report.path, threads=1), torch.Generator().manual_seed(0)
    served = [
        lengths
        for lengths in _lengths(model, call, axes)
        if _agrees(session, model, call, axes, lengths, draws)
    ]
    base = sizes(call, axes)
    assert {lengths["batch"] for lengths in served} == {1, 3}
    assert {s for lengths in served for s in base if lengths[s] != base[s]} == set(base)


def _inputs(model: Any, half: torch.dtype | None) -> dict[str, Tensor]:
    inputs = model.example_inputs(2, generator=torch.Generator().manual_seed(0))
    return {n: x.to(half) if half and x.is_floating_point() else x for n, x in inputs.items()}


def _lengths(model: nn.Module, call: Call, axes: Axes) -> Iterator[Lengths]:
    """The example's, each length by itself far away, small and odd, and all of them equal."""
    base, far = sizes(call, axes), farther(model, call)
    inner = [symbol for symbol in base if symbol != "batch"]
    choices = [base, base]
    for s in inner:
        n = base[s]
        choices += [base | {s: m} for m in (4 * n, far * n, far * n + 1, n + 1, n // 2, 1, 2, 3)]
    if inner:
        choices += [base | dict.fromkeys(inner, n) for n in (1, 2, 4, 8)]
    for i, lengths in enumerate(choices):
        yield lengths | {"batch": (1, 3)[i % 2]}


def _agrees(
    session: Session,
    model: nn.Module,
    call: Call,
    axes: Axes,
    lengths: Lengths,
    draws: torch.Generator,
) -> bool:
    """Whether graph and model both run, to equal results; False if both refuse."""
    for _ in range(DRAWS):
        other = resized(call, axes, lengths, draws)
        try:
            expected = _run(model, other)
        except _REFUSALS:
            with pytest.raises(RuntimeError, match=r"^session: .* must "):
                session.run(other.tensors)
            return False
        found = [torch.from_numpy(x) for x in session.run(other.tensors).values()]
        exact, allowed = _exact(model, other, expected)
        if allowed is not None:
            assert len(found) == len(exact)
            for x, y in zip(found, exact, strict=True):
                assert x.shape == y.shape, lengths
            error = max(_apart(x, y) for x, y in zip(found, exact, strict=True))
            if error > allowed and step_of(model):
                allowed = max(allowed, 2 * _turned(model, other, exact))
            assert error <= allowed, f"{lengths}: {error:.1e} > {allowed:.1e}"
            return True
    raise AssertionError(f"{lengths}: no values away from ties")


def _exact(
    model: nn.Module, call: Call, expected: list[Tensor]
) -> tuple[list[Tensor], float | None]:
    """What the model gives in double precision and how far a graph may be off; None where the model
    itself turns on rounding errors: two values of which it takes the larger are almost equal.
    """
    wide = call.map(lambda x: x.double() if x.is_floating_point() else x)
    double = deepcopy(model).double()
    exact = _run(double, wide)
    own = max(_apart(x, y) for x, y in zip(expected, exact, strict=True))
    if any(p.dtype is torch.float16 for p in model.parameters()):
        return exact, max(TOLERANCE, 4 * own + torch.finfo(torch.float16).eps)
    if step_of(model):
        return exact, TOLERANCE
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in double.parameters():
            if p.is_floating_point():
                p.mul_(1 + SHAKE * torch.randn(p.shape, generator=noise, dtype=p.dtype))
    moved = max(_apart(x, y) for x, y in zip(_run(double, wide), exact, strict=True))
    return exact, TOLERANCE if own <= TOLERANCE / 2 and moved <= 10 * TOLERANCE else None


def _turned(model: nn.Module, call: Call, exact: list[Tensor]) -> float:
    """How far a model turns that rounds the inputs of its layers: what lies between two steps falls
    to either side by a rounding error, and later layers follow.
    """
    with closing(shaken_runs(model, call)) as shaken:
        runs = [*islice(shaken, TURNS)]
    return max(_apart(x, y) for run in runs for x, y in zip(run, exact, strict=True))


def _run(model: nn.Module, call: Call) -> list[Tensor]:
    with torch.no_grad():
        return call.run(model)


def _apart(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().max()) / max(largest(y), 1e-30)
