"""Performer and efficient attention."""

from __future__ import annotations

import pytest
import torch
from definitions import SITE, assert_counted, assert_same, qkv

from effformer.attention import Efficient, Performer, Softmax
from effformer.attention.reference_efficient import efficient_reference, performer_reference
from effformer.checks import CapabilityError
from effformer.context import Context
from effformer.site import Site


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_definition(kernel: str, causal: bool) -> None:
    config = Performer.Config(kernel=kernel, causal=causal, features=5, chunk=4)
    core = Performer(config, SITE).double()
    assert_same(core, lambda q, k, v: performer_reference(q, k, v, core.projection, config))
    assert_counted(core)


def test_cross_attention() -> None:
    config = Performer.Config(features=5)
    core = Performer(config, SITE).double()
    rows = core.projection
    assert_same(core, lambda q, k, v: performer_reference(q, k, v, rows, config), m=7)
    assert_same(Efficient(Efficient.Config(), SITE), efficient_reference, m=7)
    assert_counted(core, m=7)
    assert_counted(Efficient(Efficient.Config(), SITE), m=7)


def test_causal_form_survives_huge_keys_and_does_not_leak() -> None:
    core = Performer(Performer.Config(causal=True, chunk=8), SITE)
    q, k, v = (x.detach().float() for x in qkv(40))
    k[:, :, 0] *= 60  # exponents of about -10^3 first, then ordinary ones
    out = core(q, k, v)
    assert out.isfinite().all()
    for x in (q, k, v):
        x[:, :, 20:] *= 6
    torch.testing.assert_close(core(q, k, v)[:, :, :20], out[:, :, :20], rtol=0, atol=1e-6)
    leaking = Performer(Performer.Config(causal=True, stabilizer="global"), SITE)
    q, k, v = (x.detach().float() for x in qkv(40))
    out = leaking(q, k, v)
    changed = torch.cat([k[:, :, :20], k[:, :, 20:] * 6], dim=2)
    assert (leaking(q, changed, v) - out)[:, :, :20].abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 5, 13, 64])
def test_chunk_size_does_not_matter(chunk: int) -> None:
    core, other = (
        Performer(Performer.Config(causal=True, chunk=c), SITE).double() for c in (7, chunk)
    )
    inputs = qkv()
    torch.testing.assert_close(other(*inputs), core(*inputs))


def _error(rows: torch.Tensor) -> float:
    """Mean squared error against softmax attention over the draws (D, R, 16)."""
    site, total = Site(dim=48, heads=3), 0.0
    draws = torch.Generator().manual_seed(3)
    q, k, v = (0.3 * torch.randn(2, 3, 24, 16, generator=draws) for _ in range(3))
    exact = Softmax(Softmax.Config(), site)(q, k, v)
    for draw in rows:
        core = Performer(Performer.Config(features=rows.shape[1], eps=0.0), site)
        core.load_state_dict({"projection": draw})
        total += float((core(q, k, v) - exact).square().mean())
    return total


def test_orthogonal_rows_beat_independent_ones_and_more_rows_help() -> None:
    site = Site(dim=48, heads=3)

    def orthogonal(count: int) -> torch.Tensor:
        configs = [Performer.Config(features=count, seed=s) for s in range(20)]
        return torch.stack([Performer(c, site).projection for c in configs])

    few, many = _error(orthogonal(16)), _error(orthogonal(128))
    assert many < 0.5 * few
    assert many < _error(torch.randn(20, 128, 16))


def test_rows_depend_on_seed_and_layer_only() -> None:
    def rows(seed: int, layer: int) -> torch.Tensor:
        return Performer(Performer.Config(seed=seed), Site(dim=24, heads=3, layer=layer)).projection

    assert torch.equal(rows(1, 2), rows(1, 2))
    assert not torch.equal(rows(1, 2), rows(1, 3))
    core = Performer(Performer.Config(lengths="constant", features=20), SITE)
    torch.testing.assert_close(core.projection.norm(dim=1), torch.full((20,), 8**0.5))
    before = core.projection.clone()
    core.redraw(torch.Generator().manual_seed(5))
    assert not torch.equal(core.projection, before)


def test_empty_samples_yield_zeros_and_half_precision_is_summed_in_full() -> None:
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[0] = True
    inputs = [x.detach().bfloat16() for x in qkv()]
    for causal in (False, True):
        core = Performer(Performer.Config(causal=causal), SITE)
        out = core(*inputs, Context(mask=mask))
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()
        assert not out[1].any()
    assert not Efficient(Efficient.Config(), SITE)(*inputs, Context(mask=mask))[1].any()


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="features must be at least 1"):
        Performer.Config(features=0)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        Performer.Config(chunk=0)
    with pytest.raises(ValueError, match="no causal form"):
        Efficient.Config(causal=True)
    core = Performer(Performer.Config(causal=True, stabilizer="global"), SITE)
    q, k, v = (x.detach().float() for x in qkv())
    state = core.init_state(2, heads=3, head_dim=8, like=q)
    with pytest.raises(CapabilityError, match="stabilizer='running'"):
        core.step(q, k, v, state)
