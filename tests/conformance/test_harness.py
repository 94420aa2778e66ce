"""How sets find their adapters, and what a set says about tolerance, precision and options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Golden, adapter_for


def made(config: dict[str, Any] | None = None, **meta: Any) -> Golden:
    return Golden("made", {"config": config or {}, **meta}, {})


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("dit", "dit"), ("dit_nosigma", "dit"), ("dit2", "dit"), ("mmdits_sd3", None),
        ("ditto", None), ("macaron-bert", "macaron"), ("macaron-bert-model-big", "macaron_bert_model"),
        ("lightningdit_qknorm", "lightningdit"), ("flow-attention_long", "flow_attention"),
        ("flow-attention-gpt_tiny", "flow_attention_gpt"),
    ],
)  # fmt: skip
def test_the_longest_whole_name_wins(name: str, adapter: str | None) -> None:
    found = adapter_for(name)
    assert (found and found.__module__) == (adapter and f"conformance_{adapter}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("rtol 1e-4, atol 2e-5 against another", (1e-4, 2e-5)),
        ("atol=0.5 and rtol=3", (3.0, 0.5)),
        ({"rtol": 1e-3, "atol": 1e-6}, (1e-3, 1e-6)),
        ("rtol 1e-3", (1e-3, 1e-5)),
        (None, (1e-4, 1e-5)),
    ],
)
def test_tolerance(words: Any, expected: tuple[float, float]) -> None:
    assert made(tolerance=words).tolerance == expected


def test_atol_counts_in_units_of_the_largest_value() -> None:
    tensors = {"out.y": torch.tensor([20.0, 0.0]), "out.k": torch.tensor([200_000, 0])}
    golden = Golden("made", {"tolerance": "rtol 0, atol 1e-5"}, tensors)
    golden.assert_close(torch.tensor([20.0, 1.9e-4]), "out.y")
    with pytest.raises(AssertionError, match=r"made: out\.y: Tensor-likes are not close"):
        golden.assert_close(torch.tensor([20.0, 2.1e-4]), "out.y")
    with pytest.raises(AssertionError, match=r"made: out\.k: Tensor-likes are not equal"):
        golden.assert_close(torch.tensor([200_000, 1]), "out.k")


def test_a_set_in_double_precision_gets_double_models() -> None:
    tensors = {"in.x": torch.zeros(1, dtype=torch.float64), "in.y": torch.zeros(1, dtype=int)}
    with Golden("made", {}, tensors).precision():
        assert torch.nn.Linear(1, 1).weight.dtype == torch.float64
    with Golden("made", {}, tensors | {"out.y": torch.zeros(1)}).precision():
        assert torch.nn.Linear(1, 1).weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_names_of_activations() -> None:
    names = {"gelu (erf)": "gelu", "GELU": "gelu", "gelu_new": "gelu-tanh", "ReLU": "relu"}
    assert {name: made().activation(name) for name in names} == names
    with pytest.raises(NotImplementedError, match="made: no activation 'mish' here, only relu, "):
        made().activation("mish")


def test_refused_options() -> None:
    golden = made({"norm": "batch"})
    golden.only("norm", "layer", "batch", why="of a reason")
    golden.only("not named", 1, why="of a reason")
    with pytest.raises(
        NotImplementedError, match="made: norm='batch' is not supported, only 'layer': of a reason"
    ):
        golden.only("norm", "layer", why="of a reason")
