"""ReLU linear attention: the quadratic form, empty features, half precision, norms across heads."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from effformer.attention import Attention, Sana
from effformer.site import NormRule, Site

SITE = Site(dim=12)


def test_equals_the_quadratic_form() -> None:
    q, k, v = (torch.randn(2, 3, n, 4) for n in (5, 7, 7))
    weights = F.relu(q) @ F.relu(k).mT
    expected = weights @ v / (weights.sum(-1, keepdim=True) + 1e-15)
    torch.testing.assert_close(Sana(Sana.Config(), SITE)(q, k, v), expected)


def test_no_features_give_zeros() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    for causal in (False, True):
        core = Sana(Sana.Config(causal=causal), SITE)
        assert not core(q, -k.abs(), v).any()
        assert not core(-q.abs(), k, v).any()


def test_half_precision_is_computed_in_single() -> None:
    q, k, v = (torch.randn(1, 2, 50, 4).half() for _ in range(3))
    core = Sana(Sana.Config(), SITE)
    out = core(q, k, v)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, core(q.float(), k.float(), v.float()).half(), rtol=0, atol=0)


def test_norms_of_queries_have_their_own_epsilon() -> None:
    for eps, expected in ((None, 1e-3), (0.5, 0.5)):
        config = Attention.Config(qk_norm=True, qk_norm_eps=eps)
        part = Attention(config, Site(dim=12, heads=3, norm=NormRule(eps=1e-3)))
        assert part.q_norm.eps == part.k_norm.eps == expected


def test_norm_across_heads() -> None:
    config = Attention.Config(qk_norm="across-heads")
    part = Attention(config, Site(dim=12, heads=3, norm=NormRule(kind="rms"))).eval()
    assert part.q_norm.weight.shape == (12,)
    torch.nn.init.normal_(part.q_norm.weight)
    torch.nn.init.normal_(part.k_norm.weight)
    x = torch.randn(2, 5, 12)
    q, k, v = part.qkv(x).chunk(3, dim=-1)
    q, k = part.q_norm(q), part.k_norm(k)
    heads = [y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(part(x), part.proj(out))
