"""`torch.compile(dynamic=True)` of whole models: few graphs serve every batch and every size."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from effformer.export.inputs import graph_call, resized, resolve_axes, sizes
from torch._dynamo.utils import counters

from effformer.build import build_model
from effformer.testing import matrix
from effformer.testing.matrix import Column, columns

EVERY = [column for family in matrix.families() for column in columns(family)]
MOST_GRAPHS = 3
"""Graphs over all batches and sizes above 1, which torch sets apart."""


@pytest.mark.slow
@pytest.mark.parametrize("column", EVERY, ids=[c.title.replace(", ", "-") for c in EVERY])
def test_few_graphs_serve_every_batch_and_size(column: Column) -> None:
    model = build_model(column.preset, **column.changes).eval()
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad or not p.any()):
            p.add_(torch.randn_like(p), alpha=0.05)
    call = graph_call(model, None, where="compile")
    axes = resolve_axes(model, call, "auto", where="compile")
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, dynamic=True, backend="eager")
    base, draws = sizes(call, axes), torch.Generator().manual_seed(0)
    served = 0
    for factor in (1.0, 0.5, 2.0, 1.5):
        inner = {s: int(n * factor) for s, n in base.items() if s != "batch"}
        for batch in (2, 3):
            other = resized(call, axes, {**inner, "batch": batch}, draws)
            with torch.no_grad():
                try:
                    expected = other.run(model)
                except ValueError:  # sizes that the model refuses
                    continue
                found = other.run(compiled)
            assert_close(found, expected, rtol=1e-4, atol=1e-5)
            served += 1
    assert served >= (2 if list(base) == ["batch"] else 4)
    assert 1 <= counters["stats"]["unique_graphs"] <= MOST_GRAPHS
