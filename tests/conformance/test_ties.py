"""Sets whose numbers hang on choices stand away from ties.

Gates, top-k, hashes, matches and spikes are compared exactly. Here weights and inputs carry noise
of several units in the last place, more than the rounding of another CPU: no choice may turn.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import GOLDEN, Golden, adapter_for

CHOOSING = [
    "acm_layer", "acm_vit", "axformer", "dydit", "efficient-attention-reformer",
    "inference_survey_tome", "lmuformer_lif", "lmuformer_spiking", "triposg_moe",
]  # fmt: skip
NOISE = 1e-6


def noisy(golden: Golden, seed: int) -> Golden:
    """The set with other last digits in its weights and inputs, and the same results."""
    draws = torch.Generator().manual_seed(seed)
    tensors = dict(golden.tensors)
    for key, value in tensors.items():
        if value.is_floating_point() and {"w", "in"} & set(key.split(".")):
            factor = 1 + NOISE * (2 * torch.rand(value.shape, generator=draws) - 1).double()
            tensors[key] = (value * factor).to(value.dtype)
    return replace(golden, tensors=tensors)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CHOOSING)
def test_no_choice_turns_on_a_rounding_error(name: str, seed: int) -> None:
    golden, adapter = Golden.read(GOLDEN / f"{name}.json"), adapter_for(name)
    assert adapter is not None
    other = noisy(golden, seed)
    assert any(not torch.equal(other.tensors[k], v) for k, v in golden.tensors.items())
    with golden.precision():
        adapter(other)
