"""Forward-mode derivatives of every family that takes real numbers, against those backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from effformer.attention.backends import attend
from effformer.build import build_model
from effformer.testing.matrix import Column, columns, families

# torch's own, when forward mode is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
# spikes have a substitute for a derivative backwards, and none forwards
COLUMNS = [c for f in families() if f != "spiking-lmuformer" for c in columns(f)]


def awake(column: Column) -> Any:
    torch.manual_seed(0)
    model = build_model(column.preset, **column.changes).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model


@pytest.mark.parametrize("column", COLUMNS, ids=lambda c: c.title)
def test_both_directions_agree(column: Column) -> None:
    """``w . (J d) = (J^T w) . d``."""
    model = awake(column)
    given = model.example_inputs(2, generator=torch.Generator().manual_seed(0))
    given = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
    real = {k: x for k, x in given.items() if x.is_floating_point()}
    if not real:
        pytest.skip("tokens have no derivatives")

    def answer(*values: Tensor) -> Tensor:
        out = model(**given | dict(zip(real, values, strict=True)))
        return out[0] if isinstance(out, tuple) else out

    along = [torch.randn_like(x) for x in real.values()]
    out, moved = torch.func.jvp(answer, tuple(real.values()), tuple(along))
    weights = torch.randn_like(out)
    leaves = [x.clone().requires_grad_() for x in real.values()]
    back = torch.autograd.grad((answer(*leaves) * weights).sum(), leaves)
    parts = (weights * moved).detach()
    here = sum((g * d).sum() for g, d in zip(back, along, strict=True))
    assert_close(parts.sum(), here, rtol=1e-8, atol=1e-8, scale=float(parts.abs().sum()))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_attention_has_the_derivative_of_its_formula(
    masked: bool, causal: bool, biased: bool
) -> None:
    q, k, v, d, bias = torch.randn(5, 2, 3, 4, 4, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, 4) < 0.5 if masked else None

    def answer(backend: str) -> Tensor:
        def f(q: Tensor, v: Tensor) -> Tensor:
            return attend(
                backend, q, k, v, mask, causal=causal, scale=0.7, bias=bias if biased else None
            )

        return torch.func.jvp(f, (q, v), (d, d))[1]  # type: ignore[no-any-return]

    torch.testing.assert_close(answer("sdpa"), answer("reference"))
