"""Selective hard attention."""

from __future__ import annotations

import pytest
import torch
from definitions import SITE, assert_counted, assert_same, qkv

from effformer.attention import Softmax, TopK
from effformer.attention.reference_efficient import topk_reference
from effformer.checks import CapabilityError
from effformer.context import Context


@pytest.mark.parametrize("path", ["dense", "gather"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keep", [1, 4, 50])
def test_equals_the_definition(path: str, causal: bool, keep: int) -> None:
    core = TopK(TopK.Config(keep=keep, path=path, causal=causal), SITE)
    assert_same(core, lambda q, k, v: topk_reference(q, k, v, keep=keep, causal=causal))


@pytest.mark.parametrize("path", ["dense", "gather"])
def test_cross_attention_and_its_cost(path: str) -> None:
    core = TopK(TopK.Config(keep=4, path=path), SITE)
    assert_same(core, lambda q, k, v: topk_reference(q, k, v, keep=4), m=7)
    assert_counted(core, m=7)
    assert_counted(core, m=3)


def test_keeping_everything_is_softmax() -> None:
    q, k, v = qkv()
    mask = torch.rand(2, 1, 13, 13) > 0.3
    hard, soft = TopK(TopK.Config(keep=13), SITE), Softmax(Softmax.Config(), SITE)
    torch.testing.assert_close(hard(q, k, v), soft(q, k, v))
    torch.testing.assert_close(hard(q, k, v, Context(mask=mask)), soft(q, k, v, Context(mask=mask)))


def test_rows_have_exactly_the_weights_that_they_may_have() -> None:
    q, k, _ = qkv()
    k = k.detach().clone()
    k[:, :, 3:9] = k[:, :, :1]  # ties
    mask = torch.rand(2, 1, 13, 13) > 0.7
    mask[:, :, 5] = False
    unit = torch.eye(13, dtype=torch.float64).expand(2, 3, 13, 13)
    weights = TopK(TopK.Config(keep=4), SITE)(q, k, unit, Context(mask=mask))
    valid = mask.sum(-1).expand(2, 3, 13)
    assert torch.equal((weights > 0).sum(-1), valid.clamp(max=4))
    torch.testing.assert_close(weights.sum(-1), (valid > 0).double())


@pytest.mark.parametrize("causal", [False, True])
def test_slices_of_rows_do_not_matter(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    core = TopK(TopK.Config(keep=3, causal=causal), SITE)
    inputs, ctx = qkv(), Context(mask=torch.rand(2, 1, 13, 13) > 0.3)
    whole = core(*inputs, ctx)
    monkeypatch.setattr("effformer.attention.topk._ELEMENTS", 6 * 13 * 4)
    torch.testing.assert_close(core(*inputs, ctx), whole)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        TopK.Config(keep=0)
    with pytest.raises(CapabilityError, match="as many queries as keys"):
        TopK(TopK.Config(causal=True), SITE)(*qkv(5, 7))
