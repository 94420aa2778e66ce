"""Linformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from definitions import SITE, assert_counted, assert_same, qkv

import effformer
from effformer.attention import Linformer, Softmax
from effformer.attention.reference_efficient import linformer_reference
from effformer.checks import CapabilityError
from effformer.context import Context


@pytest.mark.parametrize("share", ["none", "key-value"])
@pytest.mark.parametrize("n", [1, 13, 16])
def test_equals_the_definition(share: str, n: int) -> None:
    core = Linformer(Linformer.Config(tokens=16, projected=5, share=share), SITE).double()
    keys = core.key
    values = keys if share == "key-value" else core.value
    assert_same(core, lambda q, k, v: linformer_reference(q, k, v, keys, values), n)
    assert_counted(core, n)
    assert_counted(core, 3, n)


def test_the_identity_as_projection_is_softmax() -> None:
    core = Linformer(Linformer.Config(tokens=13, projected=13), SITE).double()
    core.load_state_dict({"key": torch.eye(13), "value": torch.eye(13)})
    inputs = qkv()
    torch.testing.assert_close(core(*inputs), Softmax(Softmax.Config(), SITE)(*inputs))


def test_padding_on_either_side_changes_nothing() -> None:
    core = Linformer(Linformer.Config(tokens=13, projected=4), SITE).double()
    q, k, v = qkv()
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, 9:] = False
    mask[1, :4] = False
    out = core(q, k, v, Context(mask=mask))
    for i, rows in enumerate((slice(0, 9), slice(4, 13))):
        alone = core(*(x[i : i + 1, :, rows] for x in (q, k, v)))
        torch.testing.assert_close(out[i : i + 1, :, rows], alone)


def test_the_model_fixes_the_number_of_tokens() -> None:
    model = effformer.build_model("dit-nano", attn={"name": "linformer", "projected": 8})
    assert model.blocks[0].attn.part.core.tokens == 256
    model(**model.example_inputs())
    with pytest.raises(
        CapabilityError, match=r"blocks\.0\.attn.*a fixed number of keys.*choices: .*linear"
    ):
        effformer.build_model("bert-tiny", attn="linformer")
    bert = effformer.build_model("bert-tiny", attn={"name": "linformer", "tokens": 32}).eval()
    with pytest.raises(ValueError, match="40 keys, but it was built for at most 32"):
        bert(torch.zeros(1, 40, dtype=torch.int64))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="no causal form"):
        Linformer.Config(causal=True)
    for name in ("tokens", "projected"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            Linformer.Config(**{name: 0})
    with pytest.raises(
        CapabilityError, match="needs a fixed number of keys"
    ):  # of the memory, that is
        Linformer(Linformer.Config(), replace(SITE, length=9, memory_dim=24))
