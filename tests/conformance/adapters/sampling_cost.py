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
        cost = profile(_build(row, core, row["depth"]), memory=False)
        expected = {k: n for k, n in row["macs"].items() if not k.startswith("attn_")}
        expected["attn"] = row["macs"][f"attn_{core}"]
        assert cost.by_part == expected
        assert dit_parts(**shape, heads=row["heads"], attention=core) == expected
        assert cost.total == cost.executed == row["macs_total"][core]
        assert cost.total - cost.by_part["attn"] == row["macs_common"]
        assert cost.flops == row["flops_total"][core]
        assert cost.params == dit_params(**shape) == row["params"]
        assert not cost.uncounted


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
