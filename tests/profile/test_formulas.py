from __future__ import annotations

import pytest
import torch

from effformer.context import EMPTY
from effformer.profile import Counter
from effformer.profile.formulas import (
    ATTENTION,
    dit_parts,
    dynamic_block,
    factorized_attention,
    flow_attention,
    linear_attention,
    packed_attention,
    sampler_macs,
    softmax_attention,
    windowed_attention,
)
from effformer.registry import core
from effformer.site import Site


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(("n", "m"), [(16, 16), (16, 10)])
def test_formulas_equal_the_cores_and_their_operators(name: str, n: int, m: int) -> None:
    heads, width = 3, 8
    entry = core.get(name)
    part = entry.build(entry.config(), Site(dim=heads * width, heads=heads))
    q, k = torch.randn(2, heads, n, width), torch.randn(2, heads, m, width)
    ctx = EMPTY if n == m else type(EMPTY)(memory=torch.zeros(2, m, heads * width))
    with torch.no_grad(), Counter(part) as counter:
        part(q, k, k, ctx)
    formula = {"softmax": softmax_attention, "linear": linear_attention, "flow": flow_attention}
    expected = formula[name](n, heads * width, heads, m)
    assert part.macs(n, m, heads=heads, head_dim=width) == expected
    assert counter.total == 2 * expected
    assert not counter.corrections


def test_linear_costs_do_not_depend_on_the_square_of_tokens() -> None:
    for name in ("linear", "flow"):
        assert ATTENTION[name](2048, 64, 4) == 2 * ATTENTION[name](1024, 64, 4)
    assert ATTENTION["softmax"](2048, 64, 4) == 4 * ATTENTION["softmax"](1024, 64, 4)


def test_special_cases_reduce_to_softmax() -> None:
    full = softmax_attention(12, 8)
    assert packed_attention([12], 8) == full
    assert packed_attention([6, 6], 8) == full // 2
    assert windowed_attention(12, 8, window=12) == windowed_attention(12, 8, window=99) == full
    assert windowed_attention(12, 8, window=3, global_tokens=1) == full // 4 + 4 * 12 * 8
    assert factorized_attention((12,), 8) == full
    assert factorized_attention((3, 4), 8) == 2 * 12 * 7 * 8


def test_dynamic_block_with_all_gates_open_is_the_dense_block_and_routers() -> None:
    n, d, heads = 256, 384, 6
    parts = dit_parts(tokens=n, dim=d, depth=1, heads=heads, patch=2)
    dense = sum(parts[k] for k in ("qkv", "proj", "attn", "mlp"))
    gates = {"tokens": n, "dim": d, "heads": heads}
    full = dynamic_block(**gates, heads_on=heads, groups_on=heads, tokens_on=n)
    assert full == dense + 2 * (heads - 1) * d + n * (d * d / 16 + d / 16)
    half = dynamic_block(**gates, heads_on=3, groups_on=heads, tokens_on=n / 2, token_router=False)
    assert half == dense / 2 + 2 * (heads - 1) * d


def test_sampler_cost() -> None:
    assert sampler_macs(7, steps=10) == 70
    assert sampler_macs(7, steps=10, calls_per_step=2, guidance=True, decode=5) == 285
    for wrong in ({"steps": 0}, {"steps": 1, "calls_per_step": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            sampler_macs(7, **wrong)
