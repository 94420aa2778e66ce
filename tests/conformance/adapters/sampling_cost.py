"""Costs of DiT sizes: every integer of the set from our profiler, our formulas and the counters it
explains.
"""

from __future__ import annotations

from math import floor
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from effformer import build_model
from effformer.profile import profile
from effformer.profile.formulas import dit_params, dit_parts

CORES = ("softmax", "linear", "flow")
WHOLE = 12
"""Depth up to which models are counted whole."""
UNFUSED = {"name": "softmax", "backend": "reference"}


def check(golden: Any) -> None:
    for row in golden.meta["rows"]:
        _check_row(row)
        _check_counters(row)


def _build(row: dict[str, Any], attn: Any, depth: int) -> Any:
    with torch.device("meta"):
        return build_model(
            "dit-b",
            attn=attn,
            dim=row["hidden"],
            heads=row["heads"],
            depth=depth,
            patch=row["patch"],
            input_size=row["latent"],
        )


def _check_row(row: dict[str, Any]) -> None:
    shape = {
        "tokens": row["tokens"],
        "dim": row["hidden"],
        "depth": row["depth"],
        "patch": row["patch"],
    }
    for core in CORES:
        by_part, total, executed, flops, params = _costs(row, core)
        expected = {k: n for k, n in row["macs"].items() if not k.startswith("attn_")}
        expected["attn"] = row["macs"][f"attn_{core}"]
        assert by_part == expected
        assert dit_parts(**shape, heads=row["heads"], attention=core) == expected
        assert total == executed == row["macs_total"][core]
        assert total - by_part["attn"] == row["macs_common"]
        assert flops == row["flops_total"][core]
        assert params == dit_params(**shape) == row["params"]


def _costs(row: dict[str, Any], core: str) -> tuple[dict[str, int], int, int, int, int]:
    """By part, in all, executed, operations and parameters. They are affine in depth, which the
    smaller models show whole; of the deep ones two shallow models tell them.
    """
    if row["depth"] <= WHOLE:
        depths, weights = (row["depth"],), (1,)
    else:
        depths, weights = (1, 2), (2 - row["depth"], row["depth"] - 1)
    costs = [profile(_build(row, core, depth), memory=False) for depth in depths]
    assert not any(cost.uncounted for cost in costs)

    def added(values: list[Any]) -> int:
        return sum(w * int(n) for w, n in zip(weights, values, strict=True))

    parts = {k: added([cost.by_part[k] for cost in costs]) for k in costs[0].by_part}
    total, executed = added([c.total for c in costs]), added([c.executed for c in costs])
    return parts, total, executed, added([c.flops for c in costs]), added([c.params for c in costs])


def _check_counters(row: dict[str, Any]) -> None:
    """Torch's counter sees un-fused attention whole; fvcore's totals follow from ours by named
    differences.
    """
    model = _build(row, UNFUSED, row["depth"])
    inputs = {k: x.to("meta") for k, x in model.example_inputs().items()}
    with torch.no_grad(), FlopCounterMode(display=False) as by_torch:
        model(**inputs)
    assert by_torch.get_total_flops() == row["flops_total"]["softmax"]
    tokens, width, depth = row["tokens"], row["hidden"], row["depth"]
    assert 4 * (2 * depth + 1) * tokens * width == row["layernorm_extra_fvcore"]
    # The set was measured on a model that unpatchifies and normalises by einsum, whose cost fvcore
    # reads as printed.
    permutation = _printed(row["patch"] ** 2 * 8 * tokens)
    rounding = depth * (_printed(2 * tokens * width) - tokens * width)
    cases = {
        "softmax_unfused": (UNFUSED, 0),
        "softmax_fused_sdpa": ("softmax", 0),
        "linear": ("linear", rounding),
        "flow": ("flow", 4 * rounding),
    }
    for name, total in row.get("fvcore_measured", {}).items():
        attn, einsums = cases[name]
        assert _fvcore(row, attn) + permutation + einsums == total


def _printed(operations: int) -> int:
    return floor(float(f"{operations:.3e}") / 2)


def _fvcore(row: dict[str, Any], attn: Any) -> int:
    """Its total, which is affine in depth: two shallow models (of any weights) stand for the deep
    one.
    """
    models = [_build(row, attn, depth).to_empty(device="cpu") for depth in (1, 2)]
    one, two = (profile(m, memory=False, cross_check=True).cross_check[1] for m in models)
    assert one.total is not None
    assert two.total is not None
    assert one.unexplained == two.unexplained == 0
    return one.total + (row["depth"] - 1) * (two.total - one.total)
